"""Jobs on real ranks that are broken on purpose: they go on to the same bits, or stop in one sentence."""

import hashlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bytes_tokenizer import BytesTokenizer

from llama_edu.data import write_tokens
from llama_edu.errors import UserError
from llama_edu.parallel.launch import RankError
from llama_edu.parallel.resilience import FlightRecorder, first_cause, last_words, read_flight_records
from llama_edu.training.checkpoint import newest_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forks")
DP2 = {"dp": 2}


class Driver:
    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.calm = folder, 0, {}
        texts = [f"line {i}: {i * i} is the square of {i}. " for i in range(280)]
        write_tokens(texts, BytesTokenizer(), folder / "tokens")
        here = Path(__file__).parent
        command = [sys.executable, str(here / "fault_driver.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, *, plan=DP2, **job) -> dict:
        self.count += 1
        out = self.folder / f"run{self.count}"
        job |= {"plan": plan, "data": str(self.folder / "tokens"), "out": str(out), "answer": f"{out}_said"}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        found = json.loads(self.process.stdout.readline())
        assert "ranks" in found or "failed" in found, found["stderr"]
        assert not newest_checkpoint(out / "checkpoints")[1], "what has the name of a checkpoint is whole"
        assert not list((out / "checkpoints").glob(".step_*"))
        if "ranks" in found:
            entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found["metrics"] = entries
            assert [entry["step"] for entry in entries] == list(range(1, 13))
        return found

    def undisturbed(self, plan=DP2) -> dict:
        key = json.dumps(plan)
        if key not in self.calm:
            self.calm[key] = self.run(plan=plan, changes={"checkpoint_every": 0})
            assert self.calm[key]["ranks"][0]["attempt"] == 0
        return self.calm[key]

    def ends_the_same(self, found: dict, plan=DP2) -> None:
        """After one restart, the weights of a run that was left in peace, and its losses."""
        calm = self.undisturbed(plan)
        assert "ranks" in found, found
        assert [rank["attempt"] for rank in found["ranks"]] == [1] * len(calm["ranks"])
        assert found["ranks"][0]["weights"] == calm["ranks"][0]["weights"]
        assert [(e["step"], e["loss"]) for e in found["metrics"]] == [(e["step"], e["loss"]) for e in calm["metrics"]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    driver = Driver(tmp_path_factory.mktemp("faults"))
    yield driver
    driver.process.stdin.close()
    assert driver.process.wait(30) == 0


def sentences(found: dict) -> list[str]:
    return [line for line in found["stderr"].splitlines() if line.startswith("llama-edu: rank")]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_training(driver, rank):
    found = driver.run(fault={"kind": "kill", "rank": rank, "step": 7})
    driver.ends_the_same(found)
    assert [one["resumed_from"] for one in found["ranks"]] == [6, 6]
    (sentence,) = sentences(found)
    assert f"rank {rank}: was killed without a word" in sentence, sentence


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("rank", "where"), [(0, "name"), (1, "tensors")])
def test_a_rank_killed_while_saving(driver, rank, where, background):
    fault = {"kind": "save", "rank": rank, "where": where, "count": 3}
    found = driver.run(fault=fault, changes={"async_checkpoint": background})
    driver.ends_the_same(found)
    assert [one["resumed_from"] for one in found["ranks"]] == [4, 4]


@pytest.mark.slow
def test_a_rank_that_raises(driver):
    fault = {"kind": "raise", "rank": 1, "step": 7}
    found = driver.run(fault=fault)
    driver.ends_the_same(found)
    told = "rank 1: RuntimeError: the memory of this rank is broken"
    assert sentences(found) == [f"llama-edu: {told}"]


@pytest.mark.slow
def test_a_rank_that_raises_again_stops_the_job_in_one_sentence(driver):
    found = driver.run(fault={"kind": "raise", "rank": 1, "step": 7, "always": True}, restarts=0)
    told = "rank 1: RuntimeError: the memory of this rank is broken"
    assert sentences(found) == [f"llama-edu: {told}"]
    assert found["failed"] == f"RankError: {told}"


@pytest.mark.slow
def test_a_rank_that_hangs(driver, tmp_path):
    found = driver.run(fault={"kind": "hang", "rank": 1, "step": 7}, timeout=5.0, flight=str(tmp_path))
    driver.ends_the_same(found)
    (sentence,) = sentences(found)
    assert "rank 1: does not answer; rank 0 noticed: " in sentence, sentence
    report = read_flight_records(tmp_path / "attempt_0")
    assert report.late == (1,) and "rank 0 began allreduce number" in report.collective, report
    assert str(report).startswith("rank 1 was late: ")


@pytest.mark.slow
def test_a_straggler_is_named(driver, tmp_path):
    found = driver.run(fault={"kind": "slow", "rank": 1}, flight=str(tmp_path), changes={"checkpoint_every": 0})
    calm = driver.undisturbed()
    assert [rank["attempt"] for rank in found["ranks"]] == [0, 0]
    assert found["ranks"][0]["weights"] == calm["ranks"][0]["weights"]
    report = read_flight_records(tmp_path / "attempt_0")
    assert report.slowest == 1 and report.late == (), (str(report), report.waited)
    assert str(report).startswith("rank 1 is slow: ")


@pytest.mark.slow
def test_nan_on_one_rank_is_skipped_by_all(driver):
    found = driver.run(fault={"kind": "nan", "rank": 1, "step": 5})
    assert [(e["step"], e["nonfinite_ranks"]) for e in found["metrics"] if e["skipped"]] == [(5, [1])]
    for rank in found["ranks"]:
        assert (rank["attempt"], rank["skipped"]) == (0, 1)
        assert [step for step, _, skipped in rank["steps"] if skipped] == [5]
    assert [x for x in found["ranks"][0]["steps"] if x[0] != 5] == [x for x in found["ranks"][1]["steps"] if x[0] != 5]


@pytest.mark.slow
def test_nan_that_does_not_end_stops_the_job_and_names_the_rank(driver):
    changes = {"max_skipped": 2, "max_rewinds": 0}
    fault = {"kind": "nan", "rank": 1, "step": 5, "times": 2}
    found = driver.run(fault=fault, changes=changes, restarts=0)
    told = "loss or gradient was not finite in 2 steps in a row, up to step 6, there on rank 1: lower lr"
    assert told in found["failed"], found
    assert [told in sentence for sentence in sentences(found)] == [True]


@pytest.mark.slow
def test_four_ranks_divided_two_ways(driver):
    plan = {"dp": 2, "tp": 2}
    found = driver.run(plan=plan, fault={"kind": "kill", "rank": 2, "step": 7})
    driver.ends_the_same(found, plan)
    (sentence,) = sentences(found)
    assert "rank 2: was killed without a word" in sentence, sentence


class Torchrun:
    """`torchrun --max-restarts 4 -m llama_edu.train` as a person starts it, and what can befall it from outside."""

    LINE = (
        "--dim 16 --n-layers 2 --n-heads 2 --n-kv-heads 2 --model.vocab-size 258 --seq-len 16 --batch-size 4 "
        "--lr 1e-2 --steps 300 --checkpoint-every 10 --eval-every 0 --precision float32 --device cpu --no-mfu "
        "--parallel.timeout 8"
    ).split()

    def __init__(self, folder: Path, tokens: Path) -> None:
        self.logs, self.run, self.model = folder / "logs", folder / "out" / "run", folder / "out" / "model"
        self.spoken = folder / "stderr"
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "4"]
        command += ["--standalone", "--monitor-interval", "0.1", "--log-dir", str(self.logs), "-m", "llama_edu.train"]
        command += ["--data", str(tokens), "--out", str(folder / "out"), *self.LINE]
        root = str(Path(__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": root, "LLAMA_EDU_FLIGHT": str(folder / "flight")}
        with open(self.spoken, "w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def close(self):
        """End the launcher, which ends its ranks; killed, it would leave them behind."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def wait_for(self, found):
        """What `found()` returns, once it is something."""
        deadline = time.monotonic() + 240
        while not (value := found()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.spoken.read_text()
            time.sleep(0.002)
        return value

    def pid(self, attempt: int, rank: int) -> int:
        name = f"*/attempt_{attempt}/words/rank_{rank}.alive"
        (file,) = self.wait_for(lambda: list(self.logs.glob(name)))
        return json.loads(file.read_text())["pid"]

    def steps(self) -> list[dict]:
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def trains(self, attempt: int, more: int = 12) -> int:
        """Wait until this attempt has done so many steps. Returns the number of the last one."""
        self.pid(attempt, 0)
        first = len(self.steps())
        return self.wait_for(lambda: len(self.steps()) >= first + more and len(self.steps()))

    def stop_in_a_save(self, pid: int) -> None:
        """Halt a process in the middle of a save: rank 0 cannot give the folder its name before it has written."""

        def halted():
            if not (partial := list(self.run.glob("checkpoints/.step_*.partial"))):
                return False
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.2)
            if partial[0].exists():
                return True
            os.kill(pid, signal.SIGCONT)
            return False

        self.wait_for(halted)

    def stop_between_collectives(self, pid: int, records: Path) -> None:
        """Halt rank 1 when the other waits for it: halted inside of a collective it would have begun that one."""

        def halted():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            if read_flight_records(records).late == (1,):
                return True
            os.kill(pid, signal.SIGCONT)
            return False

        self.wait_for(halted)

    def end(self) -> tuple[str, list[tuple[int, float]]]:
        """Hash of the weights, and the losses."""
        assert self.process.wait(240) == 0, self.spoken.read_text()
        weights = (self.model / "model.safetensors").read_bytes()
        return hashlib.sha256(weights).hexdigest(), [(entry["step"], entry["loss"]) for entry in self.steps()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of a running process are set as Linux does")
def test_torchrun_goes_on_after_every_fault(tmp_path):
    """One job under the real launcher, struck four times from outside; every attempt is a new pair of processes."""
    import resource

    texts = [f"line {i}: {i * i} is the square of {i}. " for i in range(2000)]
    write_tokens(texts, BytesTokenizer(), tmp_path / "tokens")
    job = Torchrun(tmp_path / "struck", tmp_path / "tokens")
    try:
        job.trains(0)
        os.kill(job.pid(0, 1), signal.SIGKILL)  # killed in training
        job.trains(1)
        job.stop_in_a_save(job.pid(1, 1))
        os.kill(job.pid(1, 1), signal.SIGKILL)  # killed while saving
        job.trains(2)
        job.stop_between_collectives(job.pid(2, 1), tmp_path / "struck" / "flight" / "attempt_2")  # hangs
        job.wait_for(lambda: "does not answer" in job.spoken.read_text())
        os.kill(job.pid(2, 1), signal.SIGKILL)  # as the launcher would 30 s later
        job.trains(3)
        # Raises: the next part of a checkpoint that it writes does not fit, its words on stderr and elsewhere do.
        resource.prlimit(job.pid(3, 1), resource.RLIMIT_FSIZE, (2**16, 2**16))
        job.trains(4)
        struck = job.end()
    finally:
        job.close()
    told = [line for line in job.spoken.read_text().splitlines() if line.startswith("llama-edu: ")]
    assert len(told) == 4, told
    assert "rank 1: was killed without a word" in told[0]
    assert "rank 1: was killed without a word" in told[1]
    assert "rank 1: does not answer" in told[2]
    assert "the checkpoint of step" in told[3] and "could not be written" in told[3] and "on rank 1; " in told[3]
    assert read_flight_records(tmp_path / "struck" / "flight" / "attempt_2").late == (1,)
    with pytest.raises(UserError, match=r"a folder for each attempt, attempt_0, .*, attempt_4: name one"):
        read_flight_records(tmp_path / "struck" / "flight")
    calm = Torchrun(tmp_path / "calm", tmp_path / "tokens")
    assert struck == calm.end()


def words(folder, rank, time, sentence, lost=False):
    (folder / f"rank_{rank}.words").write_text(json.dumps({"time": time, "sentence": sentence, "lost": lost}))


def alive(folder, rank, pid, world=3):
    entry = {"pid": pid, "host": socket.gethostname(), "world": world}
    (folder / f"rank_{rank}.alive").write_text(json.dumps(entry))


def test_first_cause(tmp_path):
    assert first_cause(tmp_path) is None
    for rank in range(3):
        alive(tmp_path, rank, os.getpid())
    words(tmp_path, 0, 5.0, "Connection closed by peer", lost=True)
    assert first_cause(tmp_path) == (1, "does not answer, nor does rank 2; rank 0 noticed: Connection closed by peer")
    alive(tmp_path, 2, 2**22 + 1)  # beyond the largest process number of Linux
    rank, sentence = first_cause(tmp_path)
    assert rank == 2 and sentence.startswith("was killed without a word")
    # A rank with words of its own comes first, however late its clock, and before those that repeat it.
    words(tmp_path, 1, 1.0, "rank 2: the disk is full")
    assert first_cause(tmp_path) == (2, "the disk is full")
    words(tmp_path, 2, 9.0, "the disk is full")
    assert first_cause(tmp_path) == (2, "the disk is full")


def _ended(folder, seconds):
    """A fork that the launcher ends, and that notices `seconds` later why. Returns how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with last_words(folder, grace=1.0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(seconds)
                raise ConnectionError("Connection closed by peer")
        except RankError:
            code = 7
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_rank_that_is_ended_before_it_has_noticed_still_says_why(tmp_path, capfd):
    assert _ended(tmp_path / "soon", 0.2) == 7
    assert "llama-edu: rank 0: ConnectionError: Connection closed by peer" in capfd.readouterr().err
    assert _ended(tmp_path / "late", 60) == 128 + signal.SIGTERM
    assert not list((tmp_path / "late").glob("*.words"))


def recorder(folder, rank, calls, **how):
    with FlightRecorder(folder, rank, **how) as flight:
        for group, operation, ended in calls:
            slot = flight.begin(operation, group, sizes=[[4, 4]])
            if ended:
                flight.end(*slot, waited=0.5)


def test_flight_records_name_the_late_rank_and_the_collective(tmp_path):
    both = [("0", "allreduce", True), ("1", "allgather", True)] * 3
    recorder(tmp_path, 0, [*both, ("0", "broadcast", False)])
    recorder(tmp_path, 1, both)
    recorder(tmp_path, 2, [*both, ("0", "broadcast", False)])
    report = read_flight_records(tmp_path)
    assert report.late == (1,)
    assert str(report) == (
        "rank 1 was late: ranks 0, 2 began broadcast number 4 of group 0, sizes [[4, 4]], and it had not"
    )
    assert report.waited == {0: 3.0, 1: 3.0, 2: 3.0} and report.slowest is None
    recorder(tmp_path, 1, [*both, ("0", "allreduce", False)])
    said = str(read_flight_records(tmp_path))
    assert said.startswith("ranks called different collectives as number 4: rank 0 broadcast, rank 1 allreduce"), said


def test_a_flight_recorder_keeps_the_last_records(tmp_path):
    recorder(tmp_path, 0, [("0", "allreduce", True)] * 25, size=10)
    (found,) = read_flight_records(tmp_path).records.values()
    assert [record["number"] for record in found] == list(range(16, 26))
    assert all(record["finished"] for record in found)
    assert str(read_flight_records(tmp_path)) == "no rank was late"


def nccl(number, state):
    return {
        "record_id": number,
        "process_group": ("0", "default_pg"),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "profiling_name": "nccl:all_reduce",
        "time_created_ns": 10**9 * number,
        "time_discovered_completed_ns": 10**9 * number if state == "completed" else None,
        "input_sizes": ((3, 4),),
        "state": state,
        "is_p2p": False,
    }


def test_dumps_of_nccl(tmp_path):
    for rank, last in ((0, 7), (1, 7), (2, 6)):
        entries = [nccl(number, "scheduled" if number == 7 else "completed") for number in range(1, last + 1)]
        (tmp_path / f"nccl_trace_rank_{rank}").write_bytes(pickle.dumps({"version": "2.4", "entries": entries}))
    report = read_flight_records(tmp_path)
    assert str(report) == (
        "rank 2 was late: ranks 0, 1 began all_reduce number 7 of group 0, sizes ((3, 4),), and it had not"
    )
    assert report.waited == {}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("must_not_exist",)


def test_a_dump_is_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no flight records"):
        read_flight_records(tmp_path)
    (tmp_path / "nccl_trace_rank_0").write_bytes(pickle.dumps({"entries": [Evil()]}))
    with pytest.raises(UserError, match=r"is refused: it asks for (posix|nt)\.mkdir"):
        read_flight_records(tmp_path)
    assert not (tmp_path / "must_not_exist").exists()
    (tmp_path / "nccl_trace_rank_0").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="is no flight record"):
        read_flight_records(tmp_path)
