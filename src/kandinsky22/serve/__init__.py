"""The application: a web server with a queue of jobs, an API and the studio."""
