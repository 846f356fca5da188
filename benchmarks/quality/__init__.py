"""How good predictions are: IVON against everything else that gives a finetuned model's predictions uncertainty.

A method is an entry of a table, ``METHODS``, in a file of ``benchmarks/quality/methods``: the harness chooses its
hyperparameters, trains and judges it as all others.
"""
