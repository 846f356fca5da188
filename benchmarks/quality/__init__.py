"""How good predictions are: IVON against everything else that gives a finetuned model's predictions uncertainty.

A method is one file in ``benchmarks/quality/methods`` with one class, a :class:`~benchmarks.quality.method.Method`.
To add one, write the file: the harness finds it, chooses its hyperparameters, trains and judges it as all others.
"""
