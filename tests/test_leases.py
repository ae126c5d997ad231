"""Leases: the living are left alone and named, the dead are replaced."""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from pipelines import leases
from pipelines.leases import Holder, lease, read_holder
from stages.errors import UserError
from stages.files import Place


@pytest.fixture(params=["disk", "s3"])
def place(request, tmp_path) -> Place:
    return (Place.of(request.getfixturevalue("s3")) if request.param == "s3" else Place.of(tmp_path)) / "runs/vae/lease.json"


def test_a_lease_is_held_refused_and_given_back(place):
    with lease(place, "the run of vae", take_over="give another --work"):
        said = rf"the run of vae is in use by process {os.getpid()} on .*{re.escape(shlex.join(sys.argv))}.*; give another --work"
        with pytest.raises(UserError, match=said), lease(place, "the run of vae", take_over="give another --work"):
            pass
        with pytest.raises(UserError, match=rf"kill {os.getpid()}.*remove {place}"), lease(place, "it"):
            pass
    assert not place.exists()


def test_the_dead_are_replaced(place):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = Holder.here()
    elsewhere = replace(here, machine="another", pid=1)
    for dead in (replace(here, pid=gone.pid), replace(here, started=here.started - 99), replace(elsewhere, beat=time.time() - 99)):
        place.write(dead.to_json())
        with lease(place, "it") as held:
            assert read_holder(place) == held.holder
    place.write(b"not a lease")
    with lease(place, "it"):
        pass
    place.write(elsewhere.to_json())
    with pytest.raises(UserError, match="it is in use by process 1"), lease(place, "it"):
        pass


def test_a_holder_shows_that_it_lives_and_notices_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.02)
    place = Place.of(tmp_path / "lease.json")
    with lease(place, "it") as held:
        first = read_holder(place).beat
        deadline = time.monotonic() + 10
        while read_holder(place).beat == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read_holder(place).beat > first
        held.check()
        thief = replace(Holder.here("another"), machine="another")
        while held._lost_to is None and time.monotonic() < deadline:
            place.write(thief.to_json())
            time.sleep(0.03)
        with pytest.raises(UserError, match=r"took over here: process .*\(another"):
            held.check()
    assert read_holder(place) == thief  # who keeps it
