"""What the benchmarks share: the work, the sides that do it in turn, figures and tables.

figures      medians, spreads, targets, rows            (pure)
output       arguments, environment, Markdown, JSON
turns        sides in turn: A B A B ...
configurations  what the baselines can be set to
works        networks, their samples, a stream of them that measures itself
processes    a side in a process of its own, idle while the others are timed
preloaded    what such a process has imported when it begins
serve        what it runs: one of the roles below
  centralised   PyTorch: backpropagation and SGD
  pipelining    torch.distributed.pipelining, one stage a process
  exchange      the raw ZeroMQ exchange
  arithmetic    the block steps by hand, without any exchange
  inprocess     hamdist's own in-process engine
ours         hamdist on Ray
sides        the sides of one work, and which configuration of each is the best one
explain      where the time of a tick goes
learning     the targets of learning, and the studies that show them  (pure)
footprint    memory of the actors, against what a block has to hold
"""
