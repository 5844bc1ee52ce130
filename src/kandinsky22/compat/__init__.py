"""Functions and import paths that scripts for the reference use, and that kandinsky22 itself does not need.

Scripts reach them through the paths of the reference, such as `kandinsky22.utils`. New code imports from `kandinsky22`.
"""
