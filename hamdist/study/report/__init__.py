"""Tables, plots and the HTML page of results; differences between two runs."""
