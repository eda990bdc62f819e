"""Files of snapshots in folders and object stores; who owns a folder."""
