"""Files of snapshots in folders and object stores; the claim of a run on its folder."""
