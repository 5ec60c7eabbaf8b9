"""Dask workers on this machine, and the scheduler to which the connection may be lost."""

import os
import time
from pathlib import Path

from distributed import LocalCluster

from heimdall_onnx.common import dask as dask_workers
from heimdall_onnx.common.dask import connected, local_client, own_processors, scheduler_client


def test_workers_share_no_core(monkeypatch):
    monkeypatch.setattr(dask_workers, "physical_cores", lambda: [(0, 4), (1, 5), (2, 6)])
    assert own_processors(2) == {"0": (0, 2, 4, 6), "1": (1, 5)}
    assert own_processors(3) == {"0": (0, 4), "1": (1, 5), "2": (2, 6)}
    # There is a processor for each of four, and none for itself.
    assert own_processors(4) == {}


def test_workers_end_with_the_block_and_keep_to_their_processors():
    shares = own_processors(1)
    environment = {**os.environ, "OWN": "1"}
    with local_client(1, resources={"release": 1}, environment=environment) as client:
        seen = client.run(
            lambda dask_worker: (
                os.getpid(),
                tuple(sorted(os.sched_getaffinity(0))),
                os.environ["OWN"],
                dict(dask_worker.state.total_resources),
            )
        )
        ((pid, processors, own, resources),) = seen.values()
    assert processors == shares["0"]
    assert (own, resources) == ("1", {"release": 1})
    assert not Path(f"/proc/{pid}").exists()


def test_a_client_knows_whether_it_has_its_scheduler_again():
    options = {"n_workers": 0, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(**options) as cluster, scheduler_client(cluster.scheduler_address) as client:
        before = client.scheduler_comm
        client.loop.add_callback(before.comm.abort)
        while client.scheduler_comm is before:
            time.sleep(0.05)
        assert connected(client)
        before = client.scheduler_comm
        cluster.close()
        while client.scheduler_comm is before and client.status == "running":
            time.sleep(0.05)
        assert not connected(client, within_s=0.5)
