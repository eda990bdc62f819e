"""Tables, plots and the HTML page of results; where two runs part."""
