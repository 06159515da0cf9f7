"""What the buttons do: each action reads the form, changes the session or starts a job, and raises BadInput in one line.
One module per screen."""
