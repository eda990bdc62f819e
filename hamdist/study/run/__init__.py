"""One level or centralised backpropagation, run, scored and compared."""
