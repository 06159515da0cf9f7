"""Results to what the screens show: figures (plain Plotly dicts), tables and lines of text. One module per screen, pure functions;
a result is only read. A megabyte is 10^6 bytes."""
