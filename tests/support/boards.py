"""File trees of machines as their kernels show them: just what `edged profile detect` reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ARM = "processor\t: {n}\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nCPU part\t: 0x{part:x}\n\n"
X86 = "processor\t: {n}\nvendor_id\t: GenuineIntel\nmodel name\t: {name}\n\n"


@dataclass(frozen=True, slots=True)
class Board:
    """One machine; `files` are further files of its tree by path."""

    kernel: str = "aarch64"
    model: str = ""
    cores: int = 4
    part: int = 0xD08
    name: str = ""
    memory_mib: int = 3800
    files: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        """Write the tree below `root`, and return that."""
        cpu = [
            X86.format(n=n, name=self.name) if self.name else ARM.format(n=n, part=self.part) for n in range(self.cores)
        ]
        files = {
            "proc/cpuinfo": "".join(cpu),
            "proc/meminfo": f"MemTotal:       {self.memory_mib * 1024} kB\nMemFree:         123456 kB\n",
            "proc/sys/kernel/arch": f"{self.kernel}\n",
            **({"proc/device-tree/model": f"{self.model}\0"} if self.model else {}),
            **self.files,
        }
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
        return root


def dmi(vendor: str, product: str, case: int, board: str = "") -> dict[str, str]:
    """What the firmware of a PC says about it."""
    said = {"sys_vendor": vendor, "product_name": product, "board_name": board, "chassis_type": str(case)}
    return {f"sys/class/dmi/id/{name}": f"{text}\n" for name, text in said.items()}


def gpu(name: str) -> dict[str, str]:
    """An NVIDIA GPU that the driver serves."""
    return {
        "dev/nvidia0": "", "dev/nvidiactl": "",
        "proc/driver/nvidia/gpus/0000:01:00.0/information": f"Model: \t\t {name}\nIRQ:   \t\t 140\n",
    }  # fmt: skip


TEGRA = {"etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"}
ORIN = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
N100, XEON = "Intel(R) N100", "Intel(R) Xeon(R) Silver 4314 CPU @ 2.40GHz"
PI_5 = "Raspberry Pi 5 Model B Rev 1.0"

# What it is, the machine, and the profile that it gets (None: none fits).
BOARDS: list[tuple[str, Board, str | None]] = [
    ("pi 4 of 2 GiB", Board(model="Raspberry Pi 4 Model B Rev 1.5", memory_mib=1849), "raspberry-pi-4"),
    ("pi 4 of 8 GiB", Board(model="Raspberry Pi 4 Model B Rev 1.4", memory_mib=7812), "raspberry-pi-4"),
    ("pi 4 of 1 GiB", Board(model="Raspberry Pi 4 Model B Rev 1.1", memory_mib=905), "generic-arm64"),
    ("pi 400", Board(model="Raspberry Pi 400 Rev 1.0", memory_mib=3793), "raspberry-pi-4"),
    ("compute module 4", Board(model="Raspberry Pi Compute Module 4 Rev 1.1", memory_mib=3793), "raspberry-pi-4"),
    ("pi 5 of 8 GiB", Board(model=PI_5, part=0xD0B, memory_mib=8062), "raspberry-pi-5"),
    ("pi 5 of 2 GiB", Board(model=PI_5, part=0xD0B, memory_mib=2006), "generic-arm64"),
    ("pi 500", Board(model="Raspberry Pi 500 Rev 1.0", part=0xD0B, memory_mib=8062), "raspberry-pi-5"),
    ("pi 3", Board(model="Raspberry Pi 3 Model B Plus Rev 1.3", part=0xD03, memory_mib=905), "generic-arm64"),
    ("orin nano, JetPack 6", Board(model=ORIN, cores=6, part=0xD42, memory_mib=7607, files=TEGRA), "jetson-orin-nano"),
    ("orin nano, JetPack 5", Board(model="NVIDIA Orin Nano Developer Kit", cores=6, part=0xD42, memory_mib=6330,
                                   files=TEGRA), "jetson-orin-nano"),
    ("orin nano without NVIDIA's Linux", Board(model=ORIN, cores=6, part=0xD42, memory_mib=7607), "generic-arm64"),
    ("orin nano of 4 GB", Board(model=ORIN, cores=6, part=0xD42, memory_mib=3400, files=TEGRA), "generic-arm64"),
    ("orin agx", Board(model="NVIDIA Jetson AGX Orin Developer Kit", cores=12, part=0xD42, memory_mib=30000,
                       files=TEGRA), "generic-arm64"),
    ("another board", Board(model="Radxa ROCK 5B", cores=8, part=0xD0B, memory_mib=15900), "generic-arm64"),
    ("arm server", Board(cores=64, part=0xD0C, memory_mib=128000), "generic-arm64"),
    ("arm server with a GPU", Board(cores=64, part=0xD0C, memory_mib=128000, files=gpu("NVIDIA L4")), "gpu-host"),
    ("office PC", Board("x86_64", name="Intel(R) Core(TM) i5-8500", memory_mib=15800, cores=6,
                        files=dmi("Dell Inc.", "OptiPlex 7060", 3)), "generic-x86-64"),
    ("virtual machine", Board("x86_64", name="AMD EPYC", memory_mib=3900, cores=2,
                              files=dmi("QEMU", "Standard PC (Q35 + ICH9, 2009)", 1)), "generic-x86-64"),
    ("PC that says nothing", Board("x86_64", name=N100, memory_mib=7800), "generic-x86-64"),
    ("gateway by its case", Board("x86_64", name=N100, memory_mib=7800, files=dmi("Default string", "N100", 34)),
     "x86-gateway"),
    ("gateway by its maker", Board("x86_64", name=N100, memory_mib=15700, files=dmi("OnLogic", "CL250", 3)), "x86-gateway"),
    ("gateway with too much for one", Board("x86_64", name=XEON, cores=16, memory_mib=64000,
                                            files=dmi("Advantech", "SKY-8101", 23)), "generic-x86-64"),
    ("gateway with a GPU", Board("x86_64", name=N100, cores=8, memory_mib=15900,
                                 files=dmi("Neousys", "Nuvo", 34) | gpu("NVIDIA RTX A2000")), "gpu-host"),
    ("workstation with a GPU", Board("x86_64", name=XEON, cores=32, memory_mib=64000,
                                     files=gpu("NVIDIA GeForce RTX 4090")), "gpu-host"),
    ("small PC with a GPU", Board("x86_64", name=N100, memory_mib=7800, files=gpu("NVIDIA T400")), "generic-x86-64"),
    ("GPU whose device is hidden from a service", Board("x86_64", name=XEON, cores=16, memory_mib=64000,
                                                        files={"sys/bus/pci/drivers/nvidia/0000:01:00.0/vendor": "0x10de"}),
     "gpu-host"),
    ("32-bit ARM", Board("armv7l", model="Raspberry Pi 4 Model B Rev 1.5", memory_mib=3793), None),
    ("RISC-V", Board("riscv64", model="StarFive VisionFive 2", memory_mib=7900), None),
    ("container of 512 MiB on a pi 5", Board(model=PI_5, part=0xD0B, memory_mib=8062, files={
        "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{512 << 20}\n"}), "generic-arm64"),
    ("service with a limit on a pi 5", Board(model=PI_5, part=0xD0B, memory_mib=8062, files={
        "proc/self/cgroup": "0::/system.slice/edged.service\n",
        "sys/fs/cgroup/system.slice/edged.service/memory.max": "max\n",
        "sys/fs/cgroup/system.slice/memory.max": f"{4 << 30}\n"}), "raspberry-pi-5"),
    ("container of the old kind", Board("x86_64", name=XEON, cores=32, memory_mib=64000, files=gpu("NVIDIA L4") | {
        "proc/self/cgroup": "7:cpu,cpuacct:/docker/1\n5:memory:/docker/1\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 << 30}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}),
     "generic-x86-64"),
    ("container that hides the board", Board(part=0xD0B, memory_mib=8062, files={
        "proc/cpuinfo": ARM.format(n=0, part=0xD0B) * 4 + f"Revision\t: d04170\nModel\t\t: {PI_5}\n"}), "raspberry-pi-5"),
]  # fmt: skip
