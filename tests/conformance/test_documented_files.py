"""What a flow's file takes over from others: steps that its roots reach, calls through pointers, other versions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kit.flows.documented import Documented, FlowFileError
from kit.flows.documented_files import complete


def row(name: str, *calls: object, source: str = "a.c @ 1") -> dict[str, object]:
    return {"name": name, "source": source, "line": 1, "calls": list(calls), "when": "Always, in this test."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two flows' folders: `driver` extends `kernel`, and calls into it go back through a pointer."""

    def write(name: str, **data: object) -> None:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump({"events": [], "hardware": [], **data}))

    write(
        "kernel/flow.yaml", flow="kernel", roots=["syscall", "other"], hardware=["cpu"], together=["fault"],
        steps=[row("syscall", ["fault", "first_callback"]), row("other"), row("fault"), row("first_callback")],
    )  # fmt: skip
    write("steps/new.yaml", steps=[row("fault", source="a.c @ 2")])
    write(
        "driver/flow.yaml", flow="driver", extends=["kernel/flow.yaml"], roots=["ioctl", "syscall"], hardware=["nic"],
        pointers=[{"member": "ops.callback", "functions": ["first_callback", "own_callback"]}],
        variants={"new": ["steps/new.yaml"]}, steps=[row("ioctl", "fault"), row("own_callback")],
    )  # fmt: skip
    return tmp_path


def test_steps_that_the_roots_reach_are_taken_over_and_no_others(folder: Path) -> None:
    documented = Documented.read(folder / "driver" / "flow.yaml")
    assert set(documented.steps) == {"ioctl", "syscall", "fault", "first_callback", "own_callback"}
    assert documented.flow == "driver" and documented.hardware == ["nic", "cpu"]
    assert documented.steps["fault"].together


def test_a_call_through_a_pointer_may_reach_every_function_of_the_member(folder: Path) -> None:
    documented = Documented.read(folder / "driver" / "flow.yaml")
    assert documented.steps["syscall"].calls == [["fault", "first_callback", "own_callback"]]


def test_what_has_no_place_in_a_flow_is_left_out_with_the_calls_to_it(folder: Path) -> None:
    file = folder / "driver" / "flow.yaml"
    data = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**data, "without": ["first_*"]}))
    documented = Documented.read(file)
    assert documented.steps["syscall"].calls == [["fault", "own_callback"]]
    assert "first_callback" not in documented.steps


def test_a_variant_comes_before_what_the_file_extends(folder: Path) -> None:
    file = folder / "driver" / "flow.yaml"
    sources = [Documented.read(file, variant).steps["fault"].source for variant in ("", "new", "unknown")]
    assert sources == ["a.c @ 1", "a.c @ 2", "a.c @ 1"]


def test_a_step_twice_in_one_file_is_still_refused(folder: Path) -> None:
    file = folder / "driver" / "flow.yaml"
    data = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**data, "steps": [*data["steps"], row("ioctl")]}))
    with pytest.raises(FlowFileError, match="ioctl is defined twice"):
        Documented.read(file)


def test_files_that_extend_each_other_are_read_once(folder: Path) -> None:
    file = folder / "kernel" / "flow.yaml"
    data = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**data, "extends": ["driver/flow.yaml"]}))
    assert {r["name"] for r in complete(folder / "driver" / "flow.yaml")["steps"]} >= {"ioctl", "syscall"}


@pytest.mark.parametrize("flow", ["mlx5_implicit_mr", "mlx5_odp_mr", "rc_pingpong", "rdma_follows_migration"])
@pytest.mark.parametrize("era", ["old", "mid", "new"])
def test_the_flows_over_mlx5_have_a_graph_for_every_kernel(flow: str, era: str) -> None:
    documented = Documented.load(flow, era)
    callback = "mlx5_ib_invalidate_range"
    assert "mmu_notifier_invalidate_range_start" in documented.callers(callback)
    waits = documented.steps["mlx5_ib_dereg_mr"].callees() + documented.steps["free_implicit_child_mr_work"].callees()
    assert ("synchronize_srcu" in waits) is (era == "old")
    assert ("populate_ksm" in documented.steps) is (era == "new")
