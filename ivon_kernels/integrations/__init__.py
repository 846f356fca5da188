"""What other libraries need beside the optimizer itself. Importing this package imports none of them.

- :mod:`ivon_kernels.integrations.state_dict`: ``state_dict()`` of a model holds the mean at any moment.
- :mod:`ivon_kernels.integrations.transformers`: the Trainer of Hugging Face Transformers, and those of TRL.
- :mod:`ivon_kernels.integrations.averaging`: the average of the mean over a run's later steps, in these trainers.
- :mod:`ivon_kernels.integrations.lightning`: a callback for Lightning's Trainer.
- :mod:`ivon_kernels.integrations.trl`: which weights the rollouts of TRL's GRPOTrainer are generated with.
"""
