"""What hamdist is compared with: golden trajectories, whole networks by autograd."""
