"""The browser interface. Nothing here imports torch when it is imported: the port is bound first."""
