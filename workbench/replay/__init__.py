"""The float model run again: trajectories recorded once, replayed forwards and backwards by every later stage."""
