"""How fast and how small the optimizer is, side by side with what a user could pick instead: CPU and GPU, one suite.

Every measurement is a :class:`~benchmarks.speed.contender.Contender` on a
:class:`~benchmarks.speed.workloads.Workload`. Ours are in `lineup.py`, the others in the table of `peers.py`. **To add
a peer**, add one row there: tables, plots, record and report show what is in it. A contender says

- `name`: as the tables show it, the version included where it matters;
- `build`: takes parameters that have gradients, makes the optimizer, and returns a `Step`, which does the optimizer's
  part of one training step each time it is called. The gradients are the same in every step; an optimizer that takes
  them away needs them put back. Imports of the peer belong in here: if it is broken, it is a row with its reason;
- `package`: the distribution to look for, if it may be missing;
- `operations`: what a step moves through memory, as keys of :data:`~benchmarks.speed.traffic.OPERATIONS`;
- `like_adamw`: for the update of ``torch.optim.AdamW``: `rounding` or `similar`, which say how far its weights may be
  from AdamW's after two steps. All must change them in both steps, and leave them finite. What fails is not timed;
- `compiles`, `turns`, `most_elements`, `bytes_needed`: for those that compile for long, are slow, or need much memory.

The order: `contender.py`, `peers.py` and `lineup.py` (what is measured), `verify.py` (is it right?), `clock.py` and
`measure.py` (how long does it take?), `steps.py`, `host.py` and `model.py` (the parts), `record.py` (the JSON),
`targets.py`, `plots.py`, `report.py`, `run.py`, which calls them, and `compare.py` for two records.
"""
