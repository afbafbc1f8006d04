"""NVIDIA machine code as text: who follows whom, which registers a part of a kernel uses, and the constants in wgmma's
descriptors."""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NVCC = (
    (os.environ.get("CUDA_HOME") and shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"], "bin"))))
    or shutil.which("nvcc")
    or shutil.which("/usr/local/cuda/bin/nvcc")
)


def _cuobjdump() -> str | None:
    """NVIDIA's disassembler: the toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    folders = [os.environ.get("PATH", ""), *([str(Path(NVCC).resolve().parent)] if NVCC else [])]
    folders += [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


CUOBJDUMP = _cuobjdump()
Code = list[tuple[int, str]]  # (address, instruction)


@functools.cache
def kernels(cubin: Path) -> dict[str, Code]:
    """{mangled name: code} of a cubin."""
    # cuobjdump calls nvdisasm beside it
    env = os.environ | {"PATH": f"{Path(CUOBJDUMP).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    text = subprocess.run([CUOBJDUMP, "-sass", str(cubin)], capture_output=True, text=True, check=True, env=env).stdout
    found = {}
    for function in re.split(r"\n\s*Function : ", text)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", function)
        found[function.split("\n", 1)[0].strip()] = [(int(address, 16), instruction) for address, instruction in lines]
    return found


def innermost_loops(code: Code, holding: str) -> list[list[str]]:
    """The instructions of every loop that holds `holding` and no smaller such loop: from a conditional backward
    branch's target to the branch.

    Unconditional backward branches lead back from spin loops, which ptxas moves to the end of a kernel.
    """
    spans = []
    for address, instruction in code:
        branch = re.match(r"@!?U?P\d\s+BRA\s+0x([0-9a-f]+)", instruction)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    spans = [(lo, hi) for lo, hi in spans if any(lo <= a <= hi and holding in i for a, i in code)]
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[i for a, i in code if lo <= a <= hi] for lo, hi in sorted(set(inner))]


def successors(code: Code) -> list[list[int]]:
    """For each instruction the numbers of those that may follow it; none after an indirect branch."""
    number = {address: n for n, (address, _) in enumerate(code)}
    follow = []
    for n, (_, instruction) in enumerate(code):
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", instruction)
        last = re.match(r"(EXIT|BRX|RET|BRA(?!.*\bU?P\d))", instruction)
        follow.append(
            ([number[int(branch[1], 16)]] if branch else []) + ([] if last or n + 1 == len(code) else [n + 1])
        )
    return follow


def reachable(follow: list[list[int]], first: int) -> set[int]:
    """The instructions that may run from number `first` on; `follow` are their successors."""
    seen, ahead = set(), [first]
    while ahead:
        n = ahead.pop()
        if n not in seen:
            seen.add(n)
            ahead += follow[n]
    return seen


def highest_register(instruction: str) -> int:
    """The last register that it reads or writes, -1 without one: operands of several count with their last."""
    product = re.search(r"HGMMA\.64x(\d+)x16", instruction)
    wide = (
        4
        if re.search(r"\.128\b|(STSM|LDSM)\S*\.4\b", instruction)
        else 2
        if re.search(r"\.64\b|WIDE", instruction)
        else 1
    )
    count = int(product[1]) // 2 if product else wide
    return max((int(r) + count - 1 for r in re.findall(r"\bR(\d+)\b", instruction)), default=-1)


@dataclass(frozen=True, order=True)
class Product:
    """One wgmma: its columns, which operands lie transposed, and of each descriptor the leading offset (in 16 bytes)
    and the high word."""

    columns: int
    transposed: str
    left: tuple[int, int]
    right: tuple[int, int]


class Constants:
    """Follows registers back to the constants that they are made of."""

    COPY = re.compile(r"(R2UR|U?MOV|IMAD\.MOV(\.U32)?|IMAD\.U32)$")
    ADD = re.compile(r"(VIADD|U?IADD3(\.64|\.X)?|IMAD\.IADD|IMAD\.X)$")

    def __init__(self, code: Code):
        self.before = [[] for _ in code]
        for n, following in enumerate(successors(code)):
            for m in following:
                self.before[m].append(n)
        self.writes = [self._write(instruction) for _, instruction in code]

    @staticmethod
    def _write(instruction: str) -> dict[str, tuple]:
        """{register: (operation, its arguments, whether it may not happen)} of what an instruction writes."""
        found = re.match(r"(@\S+\s+)?(\S+) (U?R)(\d+), (.*)$", instruction)
        if not found:
            return {}
        condition, operation, kind, number, rest = found.groups()
        arguments = [argument.removesuffix(".reuse") for argument in rest.split(", ")]
        written = {f"{kind}{number}": (operation, arguments, bool(condition))}
        if operation.endswith(
            "IADD3.64"
        ):  # a pair of registers: the upper one's source is the upper one of the first pair
            upper = re.sub(r"\d+", lambda digits: str(int(digits[0]) + 1), arguments[0])
            written[f"{kind}{int(number) + 1}"] = (operation, [upper], bool(condition))
        return written

    def values(self, n: int, register: str, part, seen: set | None = None) -> set:
        """What instruction n may find in `register`, each value as `part` reads it from what wrote it."""
        found, ahead, passed = set(), list(self.before[n]), set()
        seen = set() if seen is None else seen
        while ahead:
            m = ahead.pop()
            if m in passed:
                continue
            passed.add(m)
            write = self.writes[m].get(register)
            if write is None or write[2]:
                ahead += self.before[m]
            if write is not None and (m, register) not in seen:
                seen.add((m, register))
                source = part(*write[:2])
                found |= self.values(m, source, part, seen) if isinstance(source, str) else {source}
        return found

    @classmethod
    def passed_on(cls, operation: str, arguments: list[str]):
        """The one register that is moved or added to, or, as no value that is expected, the instruction."""
        registers = [argument for argument in arguments if re.fullmatch(r"U?R\d+", argument)]
        known = cls.COPY.match(operation) or cls.ADD.match(operation)
        return registers[0] if known and len(registers) == 1 else (operation, *arguments)

    @classmethod
    def high(cls, operation: str, arguments: list[str]):
        """A descriptor's high word: a constant that is moved about, and to which carries of 0 are added."""
        if cls.COPY.match(operation) and re.match(r"-?0x", arguments[-1]):
            return int(arguments[-1], 16) & 0xFFFFFFFF
        return cls.passed_on(operation, arguments)

    @classmethod
    def leading(cls, operation: str, arguments: list[str]):
        """A descriptor's leading offset: what is joined to the address, to which less than 2^16 is added."""
        if re.match(r"U?LOP3", operation) and "0xfc" in arguments:
            return int(next(argument for argument in arguments if argument.startswith("0x")), 16) >> 16
        return cls.passed_on(operation, arguments)


def products(code: Code) -> list[Product]:
    """Every wgmma of a kernel; a descriptor's word that is no one constant stands there as what wrote it."""
    constants, found = Constants(code), []
    for n, (_, instruction) in enumerate(code):
        product = re.search(r"HGMMA\.64x(\d+)x16\S* \S+ gdesc\[UR(\d+)\](\S*),", instruction)
        if product:
            first = int(product[2])
            words = [
                (
                    constants.values(n, f"UR{first + low}", Constants.leading),
                    constants.values(n, f"UR{first + low + 1}", Constants.high),
                )
                for low in (0, 2)
            ]
            left, right = (
                tuple(w.pop() if len(w) == 1 else tuple(sorted(map(str, w))) for w in pair) for pair in words
            )
            found.append(Product(int(product[1]), product[3], left, right))
    return found
