"""A Dask scheduler and workers as processes of their own, as on a cluster; and a self-signed
certificate for them."""

import datetime
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]


@contextmanager
def dask_processes(folder, num_workers=0, tls=()):
    """Starts them; yields the scheduler's address and its process."""
    file = folder / "scheduler.json"
    address = ("--host", "tls://127.0.0.1" if tls else "tcp://127.0.0.1", "--port", "0")
    quiet = ("--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file))
    processes = [_start(folder, "scheduler", *address, *quiet, *tls)]
    try:
        while not file.exists() or not file.read_text().endswith("}"):
            assert processes[0].poll() is None, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        found = json.loads(file.read_text())["address"]
        for i in range(num_workers):
            local = ("--local-directory", str(folder / f"worker{i}"), "--no-dashboard")
            processes.append(_start(folder, "worker", found, "--nthreads", "1", *local, *tls))
        yield found, processes[0]
    finally:
        for process in reversed(processes):
            process.kill()  # a worker ends with its nanny
            process.wait()


def _start(folder, role, *arguments):
    command = [sys.executable, "-m", f"distributed.cli.dask_{role}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / f"{role}.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)


def self_signed_certificate(folder):
    """(certificate, key): PEM files of an authority that signs itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(pem))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "certificate.pem"), str(folder / "key.pem")
