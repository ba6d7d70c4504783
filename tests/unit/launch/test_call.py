"""A host that is refused tells the others without torch: torch's own store reads what it says."""

import contextlib
import json
import socket
import threading
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from megatron_mlra.launch.call import COUNT, Call, key, refuse
from megatron_mlra.launch.ports import reserve_port


@pytest.mark.parametrize("libuv", [True, False])
def test_torchs_store_has_the_call(libuv):
    store = TCPStore(
        "127.0.0.1", 0, None, True, timedelta(seconds=9), wait_for_workers=False, use_libuv=libuv
    )
    store.add(COUNT, 2)
    assert refuse(f"localhost:{store.port}", "2", "run", 'there is no "data" - né')
    call = Call(**json.loads(store.get(key(3))))
    assert (call.host, call.code, call.nodes) == (socket.gethostname(), 2, "2")
    assert call.why == 'there is no "data" - né' and store.add(COUNT, 0) == 3


def test_nobody_to_tell_ends_at_once():
    with reserve_port() as kept:
        own = f"127.0.0.1:{kept.getsockname()[1]}"
        # The first host itself; no port; no host; a port of no number.
        for endpoint in (own, "localhost", "no.such.host.invalid:1", "localhost:x", ""):
            assert not refuse(endpoint, "2", "run", "x")


@pytest.mark.parametrize("said", [b"", b"HTTP", b"HTTP/1.1 400 Bad Request"])
def test_another_program_may_answer_anything(said):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            with other.accept()[0] as client:
                client.sendall(said)
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while client.recv(1024):
                        pass

        thread = threading.Thread(target=answer)
        thread.start()
        assert not refuse(f"127.0.0.1:{other.getsockname()[1]}", "2", "run", "x")
        thread.join()
