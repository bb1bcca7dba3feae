"""A vLLM platform that says it is a GPU which is not there."""

from __future__ import annotations

from vllm.platforms.interface import DeviceCapability, PlatformEnum, UnspecifiedPlatform

from epfuse.target import Target

PLATFORMS = {
    Target.CPU: (PlatformEnum.CPU, None),
    Target.GFX942: (PlatformEnum.ROCM, (9, 4)),
    Target.GFX950: (PlatformEnum.ROCM, (9, 5)),
    Target.SM90: (PlatformEnum.CUDA, (9, 0)),
}


class PretendPlatform(UnspecifiedPlatform):
    """One object for the whole process, since vLLM's modules keep the one that they found at import."""

    device_name = "pretended"
    device_type = "cpu"
    target = Target.CPU

    def become(self, target: Target) -> None:
        self.target = target
        self._enum = PLATFORMS[target][0]

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        capability = PLATFORMS[self.target][1]
        return None if capability is None else DeviceCapability(*capability)

    def has_device_capability(self, capability, device_id: int = 0) -> bool:
        own = self.get_device_capability()
        if own is None:
            return False
        return own >= capability if isinstance(capability, tuple) else own.to_int() >= capability

    def is_device_capability(self, capability, device_id: int = 0) -> bool:
        own = self.get_device_capability()
        return own is not None and (own == capability if isinstance(capability, tuple) else own.to_int() == capability)

    def is_device_capability_family(self, capability: int, device_id: int = 0) -> bool:
        own = self.get_device_capability()
        return own is not None and own.to_int() // 10 == capability // 10

    def supports_mx(self) -> bool:
        return self.target is Target.GFX950

    def supports_fp8(self) -> bool:
        return self.target.is_gpu

    def is_fp8_fnuz(self) -> bool:
        return self.target is Target.GFX942

    def get_device_name(self, device_id: int = 0) -> str:
        return "pretended"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return 192 << 30

    def num_compute_units(self, device_id: int = 0) -> int:
        return 304
