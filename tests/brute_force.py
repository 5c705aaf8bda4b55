"""What ranks send each other, found rank by rank from the operators' own blocks."""

import numpy as np
import torch

from spectral_ds.geometry.block import LocalBlock
from spectral_ds.geometry.owners import RowOwners
from spectral_ds.graph import Edges
from spectral_ds.laplacian.transpose import Transposition, column_slices
from spectral_ds.sharding import Communicator, by_parameter, intervals


def needed_by_brute_force(bucket, families, layout):
    """(target, source): elements that one rank needs of another, by the operators' own blocks."""
    nodes = np.arange(bucket.nodes)
    one_way = [f.edges(bucket.parameters, bucket.first_node, nodes) for f in families]
    edges = Edges.concatenate(one_way + [each.reversed() for each in one_way]).combined(np.add)
    owners = RowOwners.of(bucket, layout)
    needed = np.zeros((layout.world_size, layout.world_size))
    for rank, fragments in enumerate(layout.fragments):
        block = LocalBlock.of(bucket.width, bucket.rectangles(by_parameter(fragments)), edges)
        pieces = intervals.cut(block.needed, owners.start)
        source = owners.of_address(pieces[:, 0])
        np.add.at(needed[rank], source, pieces[:, 1] - pieces[:, 0])
    return needed


def moved_by_brute_force(bucket, layout):
    """(target, source): elements that one rank gets of another when the bucket is transposed."""
    size = layout.world_size
    elements = RowOwners.of(bucket, layout).elements(size)
    slices = column_slices(elements, bucket.width)
    rectangles = [bucket.rectangles(by_parameter(own)) for own in layout.fragments]
    moved = np.zeros((size, size))
    for rank in range(size):
        communicator = Communicator.alone(torch.device("cpu"))
        communicator.rank, communicator.world_size = rank, size
        plan = Transposition.plan(bucket.nodes, rectangles, slices, communicator)
        moved[rank] = plan.buffers.receive_splits
    return moved


def same_flow(flow, pairs, cluster):
    machine = np.arange(cluster.world_size) // cluster.ranks_per_machine
    near = pairs * (machine[:, None] == machine)
    np.testing.assert_array_equal(flow.received, pairs.sum(axis=1))
    np.testing.assert_array_equal(flow.sent, pairs.sum(axis=0))
    np.testing.assert_array_equal(flow.received_near, near.sum(axis=1))
    np.testing.assert_array_equal(flow.sent_near, near.sum(axis=0))
