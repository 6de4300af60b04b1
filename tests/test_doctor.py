"""The doctor says what is there and what will not work, and never more than that."""

import importlib.metadata
import shutil

import pytest

from llama_edu.cli import doctor as module
from llama_edu.cli.main import run


def findings():
    return {(f.subject, f.state): f.text for f in module.examine()}


def test_here_everything_works(capsys):
    assert run(["doctor"]) == 0
    said = capsys.readouterr().out
    assert said.strip().endswith("all lessons and tests will run here")
    for subject in ("python", "packages", "memory", "disk", "processor", "compiler", "gpu"):
        assert f" {subject} " in said


def test_a_missing_package_is_a_fault_with_the_way_out(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "einops":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0.1" if name == "regex" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = findings()
    assert "einops is missing: make setup" in found["packages", "fault"]
    assert "regex 0.0.1 instead of" in found["versions", "note"]
    assert run(["doctor"]) == 1
    assert "will not work before it is mended: packages" in capsys.readouterr().out


def test_another_python_is_a_fault(monkeypatch):
    monkeypatch.setattr(module.sys, "version_info", (3, 14, 0))
    assert "3.11, 3.12 or 3.13 is needed" in findings()["python", "fault"]


def test_little_memory_disk_and_no_compiler_are_notes(monkeypatch, capsys):
    monkeypatch.setattr(module.os, "sysconf", lambda name: 1 << 15)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    found = findings()
    assert "need 4 GiB" in found["memory", "note"]
    assert "3 GiB are needed" in found["disk", "note"]
    assert "torch.compile on the CPU will not work" in found["compiler", "note"]
    assert not [key for key in found if key[1] == "fault"]
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.strip().endswith("will run here, but see above: memory, disk, compiler")


@pytest.mark.parametrize("gib", [16, 80])
def test_a_gpu_is_named_with_its_memory(monkeypatch, gib):
    import torch

    properties = type("P", (), {"name": "NVIDIA H100", "total_memory": gib << 30})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    assert findings()["gpu", "ok"].startswith(f"NVIDIA H100 with {gib} GiB, NVIDIA H100 with {gib} GiB; CUDA ")
