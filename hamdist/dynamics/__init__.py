"""The mathematics of learning over time: no process, socket, file or clock.

In the order in which a signal meets it: `graph` (blocks and edges), `schedule` (which block steps
when, and which signals it takes), `vjp` (the local function f and its vector-Jacobian products),
`blocks` (Hamilton's equations of one block), `updates` (how weights move), `objective` (losses and
scores). How a model becomes a graph: `user_modules`, `tracing`, `slicing`, `partition`.
`one_tick` is a whole tick on one page."""
