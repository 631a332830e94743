"""What childtuning is measured against."""

import warnings

# Said by Opacus, BackPACK, BAdam and PEFT once a run; nothing that a reader of a benchmark can act on.
for message in (
    "Full backward hook is firing",
    "Sparse invariant checks are implicitly disabled",
    ".is_gradient_checkpointing. is deprecated",
):
    warnings.filterwarnings("ignore", message=message)
