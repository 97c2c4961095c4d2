"""The ``kit`` command: what it prints, writes and returns, and how it takes wrong input."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import fakes
import pytest

from kit import cli, outputs


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    fakes.install(monkeypatch, tmp_path_factory.mktemp("project"))


def left(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_list_names_flows_scenarios_and_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert capsys.readouterr().out.startswith("fake_flow: A flow that does nothing\n  broken\n  default\nmachines:\n")
    assert cli.main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    title = "A flow that does nothing"
    assert found["flows"] == [{"name": "fake_flow", "title": title, "scenarios": ["broken", "default"]}]


def test_run_prints_table_metrics_and_health(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "fake_flow", "-s", "default"]) == 0
    out = capsys.readouterr().out
    assert "Total CPU Page faults: 2" in out  # nvprof's own words
    assert "simulated_us  1.2288e+07" in out
    assert "documented steps: 2 of 3 reached, 0 violations" in out
    assert "page content: 7 pages checked, 0 lost" in out
    assert cli.main(["run", "fake_flow", "--nvprof"]) == 0
    assert "simulated_us" not in capsys.readouterr().out
    assert cli.main(["run", "fake_flow", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_every_way_to_set_a_parameter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("size: 1\nshare: 1\nunits: [9]\n")
    arguments = ["run", "fake_flow", "-f", str(file), "-p", "size=0x10", "-p", "units=3,4", "--share", "0.25",
                 "--eager=false", "-p", "events=5", "--json", "-"]  # fmt: skip
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)["parameters"]
    assert found == {"size": 16, "share": 0.25, "eager": False, "order": "up", "units": [3, 4], "events": 5, "lost": 0,
                     "strays": 0, "broken": False}  # fmt: skip


def test_files_are_written_whole(tmp_path: Path) -> None:
    json_file, events = tmp_path / "run.json", tmp_path / "events.csv"
    json_file.write_text("old")
    arguments = ["run", "fake_flow", "-s", "default", "--json", str(json_file), "--events", str(events)]
    assert cli.main(arguments) == 0
    assert json.loads(json_file.read_text())["metrics"]["bytes_moved"] == 8192
    rows = list(csv.DictReader(events.open()))
    assert [(row["kind"], row["address"]) for row in rows] == [
        ("CPU_PAGE_FAULT_COUNT", "0"),
        ("CPU_PAGE_FAULT_COUNT", "4096"),
    ]
    first = json_file.read_bytes(), events.read_bytes()
    assert cli.main(arguments) == 0
    assert (json_file.read_bytes(), events.read_bytes()) == first
    assert left(tmp_path) == ["events.csv", "run.json"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("kit.report.events.write_events_csv", fail)
    arguments = ["run", "fake_flow", "--json", str(tmp_path / "a.json"), "--events", str(tmp_path / "b.csv")]
    assert cli.main(arguments) == 1
    assert left(tmp_path) == []


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        status = cli.main(["run", "fake_flow", "--json", str(pipe)])
        if status:
            reader.kill()  # nobody has opened the pipe's other end
        assert status == 0
        assert json.loads(reader.communicate()[0])["flow"] == "fake_flow"
    assert pipe.is_fifo()


BAD = {
    "unknown flow": (["run", "fake_flo"], "flow = 'fake_flo': allowed is one of fake_flow. Did you mean 'fake_flow'?"),
    "unknown scenario": (["run", "fake_flow", "-s", "defalt"], "scenario = 'defalt': allowed is a scenario of fake_flow: broken, default. Did you mean 'default'?"),
    "unknown parameter": (["run", "fake_flow", "-p", "sise=1"], "sise = '1': allowed is a parameter of fake_flow. Did you mean 'size'?"),
    "unknown option": (["run", "fake_flow", "--sise", "1"], "--sise = '1': allowed is an option of kit run. Did you mean '--size'?"),
    "option of an unknown flow": (["run", "fake_flo", "--size", "1"], "Did you mean 'fake_flow'?"),
    "no number": (["run", "fake_flow", "-p", "size=big"], "size = 'big': allowed is a whole number at least 1 and at most 1099511627776 B."),
    "no whole number": (["run", "fake_flow", "--size", "1.5"], "size = '1.5': allowed is a whole number"),
    "out of range": (["run", "fake_flow", "--share", "1.5"], "share = 1.5: allowed is a number at least 0"),
    "no number at all": (["run", "fake_flow", "--share", "nan"], "share = nan: allowed is a number"),
    "no boolean": (["run", "fake_flow", "--eager", "perhaps"], "eager = 'perhaps': allowed is true or false."),
    "no choice": (["run", "fake_flow", "-p", "order=upp"], "order = 'upp': allowed is one of up, down. Did you mean 'up'?"),
    "no list": (["run", "fake_flow", "-p", "units=1,b"], "units = '1,b': allowed is a list of whole numbers."),
    "no pair": (["run", "fake_flow", "-p", "size"], "-p = 'size': allowed is name=value."),
    "contradiction": (["run", "fake_flow", "-p", "size=1", "--order", "down"], "order = 'down': allowed is up when size is 1."),
    "two sources": (["run", "fake_flow", "-s", "default", "-f", "x"], "not allowed with argument"),
    "missing file": (["run", "fake_flow", "-f", "/nowhere/x.yaml"], "scenario file = '/nowhere/x.yaml': allowed is a file that can be read (No such file"),
    "no folder": (["run", "fake_flow", "--json", "/nowhere/x.json"], "--json = '/nowhere/x.json': allowed is a file in a folder that exists and may be written."),
    "a folder": (["run", "fake_flow", "--events", "/"], "--events = '/': allowed is a file, not a folder."),
    "binary on the terminal": (["run", "fake_flow", "--nsys", "-"], "--nsys = '-': allowed is a file"),
    "one file twice": (["run", "fake_flow", "--json", "/tmp/kit-x", "--events", "/tmp/./kit-x"], "allowed is another file than that of --json."),
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["rum"], "command = 'rum': allowed is one of list, run, check, sweep, batch, parameters, compile, lab. Did you mean 'run'?"),
    "two pairs": (["run", "fake_flow", "-p", "size=1", "-p", "size=2"], "size = '2': allowed is one value; the command line gives it '1' too."),
    "pair and option": (["run", "fake_flow", "-p", "size=1", "--size", "2"], "size = '2': allowed is one value"),
    "two options": (["run", "fake_flow", "--size", "1", "--size", "2"], "size = '2': allowed is one value"),
    "two axes": (["sweep", "fake_flow", "-p", "size=1,2", "-p", "size=3", "--out", "/tmp/kit-none"], "size = '3': allowed is one value"),
    "sweep of nothing known": (["sweep", "fake_flow", "-p", "sise=1,2", "--out", "/tmp/kit-none"], "Did you mean 'size'?"),
    "sweep out of range": (["sweep", "fake_flow", "-p", "share=0,2", "--out", "/tmp/kit-none"], "share = 2.0"),
    "sweep without workers": (["sweep", "fake_flow", "--jobs", "0", "--out", "/tmp/kit-none"], "--jobs = '0': allowed is a whole number at least 1."),
    "batch of an unknown scenario": (["batch", "fake_flow", "-s", "no", "--out", "/tmp/kit-none"], "scenario = 'no'"),
    "batch into a file": (["batch", "--out", "/etc/hostname/x"], "--out = '/etc/hostname/x': allowed is a folder"),
    "all and one": (["check", "fake_flow", "--all", "-s", "default"], "--all"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = BAD[name]
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:  # argparse's own way out
        status = stopped.code
    seen = capsys.readouterr()
    assert status == 2
    assert expected in seen.err
    assert seen.err.startswith("kit: error: ")
    assert seen.err.count("\n") == 1
    assert seen.out == ""
    assert not Path("/tmp/kit-none").exists()


@pytest.mark.parametrize("text", ["size: [", "- size\n- share", "3: 4", "just words", "size: \x00", "size: 1\nsize: 2"])
def test_a_malformed_scenario_file_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert cli.main(["run", "fake_flow", "-f", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kit: error: scenario file = '{file}': allowed is ")
    assert err.count("\n") == 1


def test_nothing_is_written_after_bad_input(tmp_path: Path) -> None:
    assert cli.main(["run", "fake_flow", "--size", "0", "--json", str(tmp_path / "x.json")]) == 2
    assert left(tmp_path) == []


def test_a_driver_failure_is_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run", "fake_flow", "-s", "broken", "--json", str(tmp_path / "x.json")]) == 1
    assert "uvm_fake: NV_ERR_NO_MEMORY (ENOMEM" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_check_fails_on_lost_pages_and_departures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "fake_flow", "-s", "default"]) == 0
    assert cli.main(["check", "fake_flow", "--lost", "1"]) == 1
    assert "1 lost" in capsys.readouterr().out
    assert cli.main(["check", "fake_flow", "-p", "strays=1"]) == 1
    assert "violation: a calls c" in capsys.readouterr().out


def test_sweep_writes_one_row_a_combination(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "sweep"
    arguments = ["sweep", "fake_flow", "-s", "default", "-p", "size=1,2", "-p", "units=1,2;3", "--jobs", "1",
                 "--out", str(out)]  # fmt: skip
    assert cli.main(arguments) == 0
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [(row["size"], row["units"]) for row in rows] == [
        ("1", "[1, 2]"),
        ("1", "[3]"),
        ("2", "[1, 2]"),
        ("2", "[3]"),
    ]
    assert [float(row["simulated_us"]) for row in rows] == [1500, 1500, 3000, 3000]
    assert left(out) == ["sweep.csv"]


def test_a_sweep_keeps_the_rows_around_a_failure(tmp_path: Path) -> None:
    assert cli.main(["sweep", "fake_flow", "-p", "broken=false,true", "--jobs", "1", "--out", str(tmp_path)]) == 1
    good, bad = csv.DictReader((tmp_path / "sweep.csv").open())
    assert (good["error"], good["lost"]) == ("", "0")
    assert "NV_ERR_NO_MEMORY" in bad["error"]


def test_parameters_are_a_markdown_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parameters", "fake_flow"]) == 0
    out = capsys.readouterr().out
    assert "| `eager` | true | true or false | prefetch | all | `fake_eager` |" in out
    assert "order \\| direction" in out
    assert len({line.replace("\\|", "").count("|") for line in out.splitlines() if line.startswith("|")}) == 1
    assert cli.main(["parameters", "fake_flow", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "size"


def test_help_lists_the_models_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "fake_flow", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "--size VALUE" in out
    assert "Driver policy parameters" in out


def test_progress_is_one_line_on_a_terminal_only() -> None:
    class Terminal:
        def __init__(self, terminal: bool) -> None:
            self.terminal, self.text = terminal, ""

        def isatty(self) -> bool:
            return self.terminal

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

    shown, hidden = Terminal(True), Terminal(False)
    for stream in (shown, hidden):
        with outputs.ProgressLine(stream) as progress:
            progress(1.0, "kernel")
    assert (shown.text, hidden.text) == ("\r\x1b[K100% kernel\r\x1b[K", "")


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "kit", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "kit 0.1.0\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "from kit import cli, commands; commands.COMMANDS['lab'] = lambda o: print('x' * 1_000_000); cli.main(['lab'])"
    )
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" | true'], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
