"""What torch's own CUDA code does with this project, on a card that computes nothing; budgets of steps.

The null GPU is a library in place of the CUDA runtime, cuBLAS and NCCL. It is not part of the repository: it lies
beside the recorded tensors (AMLTRAIN_SHARED), and is built with cc into a temporary folder. Memory, streams, copies and
collectives are real; kernels are counted and skipped, so no value on the device means anything.

    device.py      builds the library and starts programs under it
    steps.py       measures steps, in a process of its own
    budgets.csv    kernels, casts, float32 FLOPs and memory that a step may cost; budgets.py reads and writes it

After a change that is meant to cost more, or that saves something: `python -m tests.null_gpu.budgets` writes the table
again. Commit it with the change, so that its difference shows what the change costs.
"""
