"""`spectral-ds merge`: the filter of a change, after training, on folders of models.

In the order in which they are needed: `command` reads the arguments and has it done; `folder` and
`adapter` read models tensor by tensor, `architecture` says which matrix of the model each tensor
is (by `conversion`); `looking` calls models and finds `statistics`, with `--refresh` block by block
(`refresh`) of models that are there in parts (`skeleton`);
`combine` filters a tensor, `merging` all of them, and `output` writes them, shard by shard, so that
it can be gone on with; `report` says what was done. With `--sweep`, `sweep` puts settings into
models `in_memory`, `judges` judges them, and `frontier` draws.
"""

from spectral_ds.cli.merge.command import add_parser

__all__ = ["add_parser"]
