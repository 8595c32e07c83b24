"""What the machine is said to have, from files as Linux writes them."""

import pathlib

from data_pipelines.machine import disk_free, file_system, this_machine

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/data /data nfs4 rw 0 0
/dev/sdb1 /data/fast xfs rw 0 0
//nas/my\\040slides /mnt/my\\040slides cifs rw 0 0
/dev/sdc1 /data ext4 rw 0 0
"""


def system(root, **files):
    """Files below a root that stands for /; names with __ for the slashes."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return this_machine(root)


def test_facts_of_a_container_on_a_machine_with_a_gpu(tmp_path):
    machine = system(
        tmp_path,
        proc__cpuinfo="processor: 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor: 1\nflags\t\t: fpu avx2 avx512f\n",
        proc__meminfo="MemTotal: 9000 kB\nMemAvailable:    8000 kB\n",
        sys__fs__cgroup__cpu_dot_max="50000 100000\n",
        sys__fs__cgroup__memory_dot_max="3000000\n",
        sys__fs__cgroup__memory_dot_current="1000000\n",
        sys__kernel__mm__transparent_hugepage__enabled="always [madvise] never\n",
        dev__nvidia0="",
        dev__nvidiactl="",
    )
    assert (machine.usable_cores, machine.memory_free, machine.huge_pages) == (0.5, 2_000_000, "madvise")
    assert machine.cpu_flags == {"fpu", "avx2", "avx512f"}
    assert machine.gpus == (str(tmp_path / "dev" / "nvidia0"),)


def test_no_limits_and_what_is_not_said_stays_unknown(tmp_path):
    free = system(
        tmp_path,
        proc__meminfo="MemAvailable: 8000 kB\n",
        sys__fs__cgroup__cpu_dot_max="max 100000\n",
        sys__fs__cgroup__memory_dot_max="max\n",
        sys__fs__cgroup__memory_dot_current="1000000\n",
    )
    assert free.memory_free == 8000 * 1024 and free.usable_cores >= 1
    unknown = this_machine(tmp_path / "nothing")
    assert (unknown.memory_free, unknown.huge_pages, unknown.cpu_flags, unknown.gpus) == (None, "", frozenset(), ())


def test_file_system_is_that_of_the_longest_mount_point_and_of_the_last_one_there():
    assert file_system("/home/x", MOUNTS) == "ext4"
    assert file_system("/data/slides", MOUNTS.replace("/dev/sdc1 /data ext4", "x /y ext4")) == "nfs4"
    assert file_system("/data/slides", MOUNTS) == "ext4"  # mounted over it later
    assert file_system("/data/fast/slides/a.svs", MOUNTS) == "xfs"
    assert file_system("/mnt/my slides/a.svs", MOUNTS) == "cifs"
    assert file_system("/database", MOUNTS) == "ext4"
    assert file_system("/x", "") == ""


def test_disk_space_of_a_folder_that_is_not_there_yet(tmp_path):
    assert disk_free(tmp_path / "a" / "b") > 0 and not pathlib.Path(tmp_path, "a").exists()
