"""The command `kandinsky22`. Parsing imports nothing heavy; subcommands import what they use when they run."""
