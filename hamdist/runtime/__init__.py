"""Moving signals between blocks, in one process or in many.

In the order of a run: `train` (from model, stream and settings to a result), `plan` (the run worked
out), `placement` (which block on which actor and host), `engines` and `ray_engine` (who steps the
blocks), `nodes` (a block with its schedule and channels), `signals` and `transport` (what travels,
and how), `snapshots` and `storage` (what is written, and gone on from), `live` (a run that one
feeds and asks), `results`, `timing` (how long a tick takes, by a model), `advice`, `process`."""
