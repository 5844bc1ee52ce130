"""The command `kandinsky22`. Parsing imports no heavy package; each subcommand imports what it uses when it runs."""
