"""What this machine has, as far as it decides whether slides can be read and how fast: cores, memory, file systems."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

# Over a network every tile is a round trip. Parallel file systems of clusters are among them: their metadata is slow, too.
NETWORK_FILE_SYSTEMS = frozenset(
    [
        *(
            "9p",
            "afs",
            "beegfs",
            "ceph",
            "cifs",
            "glusterfs",
            "gpfs",
            "lustre",
            "nfs",
            "nfs4",
            "panfs",
            "smb3",
            "smbfs",
        ),
        *("fuse.ceph", "fuse.gcsfuse", "fuse.goofys", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"),
        *("virtiofs", "wekafs"),
    ]
)


@dataclass(frozen=True)
class Machine:
    """cores: of the machine; usable_cores: that this process may use, fractions by a container's quota.

    cpu_flags: empty where the system does not say (then nothing is concluded). memory_free: bytes, the least of the system's
    and the container's; None where unknown. huge_pages: the kernel's setting, "always", "madvise", "never" or "" (unknown).
    gpus: device files of accelerators that the system shows.
    """

    cores: int
    usable_cores: float
    cpu_flags: frozenset[str]
    memory_free: int | None
    huge_pages: str
    gpus: tuple[str, ...]


def this_machine(root: Path = Path("/")) -> Machine:
    """Reads /proc, /sys and /dev below `root`; what is not there (another system than Linux) stays unknown."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    flags = re.search(r"^flags\s*:(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    chosen = re.search(r"\[(\w+)\]", _text(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    gpus = [*(root / "dev").glob("nvidia[0-9]*"), *(root / "dev").glob("kfd"), *(root / "dev").glob("accel[0-9]*")]
    return Machine(
        cores=cores,
        usable_cores=min(usable, int(quota) / int(period)) if quota.isdigit() else usable,
        cpu_flags=frozenset(flags.group(1).split()) if flags else frozenset(),
        memory_free=_memory_free(root),
        huge_pages=chosen.group(1) if chosen else "",
        gpus=tuple(sorted(str(path) for path in gpus)),
    )


def file_system(path: str | os.PathLike, mounts: str | None = None) -> str:
    """The type of the file system that holds `path` ("ext4", "nfs4", ...); "" where unknown. mounts: text of /proc/mounts."""
    text = _text(Path("/proc/mounts")) if mounts is None else mounts
    place = Path(path).expanduser().absolute()
    found, depth = "", -1
    for line in text.splitlines():
        fields = line.split()
        point = Path(fields[1].encode().decode("unicode_escape")) if len(fields) > 2 else None  # spaces are \040 there
        if point is not None and place.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = fields[2], len(point.parts)
    return found


def disk_free(path: str | os.PathLike) -> int:
    """Bytes free at `path`, or at the nearest folder above it that exists."""
    place = Path(path).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def _memory_free(root: Path) -> int | None:
    """The system's available memory, or what a container's limit leaves, whichever is less."""
    amounts = []
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if available:
        amounts.append(int(available.group(1)) * 1024)
    limit, used = (_text(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        amounts.append(max(int(limit) - int(used), 0))
    return min(amounts, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
