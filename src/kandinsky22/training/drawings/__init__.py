"""Pictures that the embedded model is trained on: things from freely licensed vector drawings, composed at random."""
