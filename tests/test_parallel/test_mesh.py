import pytest

from parallel.mesh import Mesh, Place, mesh_of
from relora.errors import ConfigError


def test_places_and_ranks_are_inverse_and_tensor_is_innermost():
    mesh = Mesh(heads=2, data=3, tensor=4)
    assert mesh.world_size == 24
    assert [mesh.rank(mesh.place(rank)) for rank in range(24)] == list(range(24))
    assert [mesh.place(rank).tensor for rank in range(5)] == [0, 1, 2, 3, 0]
    assert mesh.place(23) == Place(head=1, data=2, tensor=3)


@pytest.mark.parametrize("axes", [("head",), ("data",), ("tensor",), ("data", "tensor"), ("head", "data", "tensor")])
def test_groups_are_a_partition_whose_members_differ_along_their_axes_only(axes):
    mesh = Mesh(heads=2, data=3, tensor=2)
    groups = mesh.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(12))
    for group in groups:
        for axis in {"head", "data", "tensor"} - set(axes):
            assert len({getattr(mesh.place(rank), axis) for rank in group}) == 1


def test_a_head_is_a_block_of_consecutive_processes():
    assert Mesh(heads=2, data=2, tensor=2).groups("data", "tensor") == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_the_data_axis_is_what_heads_and_tensor_leave_over():
    assert mesh_of(24, tensor=4, heads=2) == Mesh(heads=2, data=3, tensor=4)


def test_fewer_processes_than_heads_share_them_evenly():
    assert mesh_of(1, tensor=1, heads=8) == Mesh(heads=1)
    assert mesh_of(4, tensor=1, heads=8) == Mesh(heads=4)


@pytest.mark.parametrize(
    ("world", "tensor", "heads", "message"),
    [
        (
            3,
            1,
            8,
            "lte.heads=8 cannot be spread evenly over 3 processes: start a number that divides it, or a multiple",
        ),
        (6, 4, 1, "parallel.tensor=4 must divide the number of processes, got 6: start a multiple of 4"),
        (6, 2, 2, "lte.heads=2 x parallel.tensor=2 must divide the number of processes, got 6: start a multiple of 4"),
    ],
)
def test_degrees_that_do_not_divide_the_world_are_refused(world, tensor, heads, message):
    with pytest.raises(ConfigError) as error:
        mesh_of(world, tensor=tensor, heads=heads)
    assert message in str(error.value)
