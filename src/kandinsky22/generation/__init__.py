"""One generation of images from a request: modes, requests, recipes, input images, and the two stages."""
