"""The page of a run or a report: HTML, its server on this machine, and what it says in words."""
