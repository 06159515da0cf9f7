"""Which bits where: AdaTSQ's beam search and its rivals. The verb is `workbench.search.search.search`."""
