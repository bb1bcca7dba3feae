"""The allocator of tools/gpu_suite: where a tensor lies between the pieces that nothing is mapped to."""

from __future__ import annotations

import pytest

fence = pytest.importorskip("tools.gpu_suite.fence")

GRAIN = 2 << 20


class Driver:
    """CUDA's memory calls, with addresses only."""

    def __init__(self) -> None:
        self.next = GRAIN
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.created = 0
        self.waited = 0

    def cuMemGetAllocationGranularity(self, granularity, properties, option):
        granularity._obj.value = GRAIN
        return 0

    def cuMemAddressReserve(self, address, size, alignment, hint, flags):
        address._obj.value = self.next
        self.reserved[self.next] = size.value
        self.next += size.value
        return 0

    def cuMemCreate(self, handle, size, properties, flags):
        self.created += 1
        handle._obj.value = self.created
        return 0

    def cuMemMap(self, address, size, offset, handle, flags):
        self.mapped[address.value] = size.value
        return 0

    def cuMemSetAccess(self, address, size, access, count):
        return 0 if self.mapped[address.value] == size.value else 1

    def cuCtxSynchronize(self):
        self.waited += 1
        return 0

    def cuMemUnmap(self, address, size):
        return 0 if self.waited and self.mapped.pop(address.value) == size.value else 1

    def cuMemRelease(self, handle):
        self.created -= 1
        return 0

    def cuMemAddressFree(self, address, size):
        return 0 if self.reserved.pop(address.value) == size.value else 1


@pytest.mark.parametrize("size", [1, 16, 4000, GRAIN - 1, GRAIN, GRAIN + 1, 5 * GRAIN + 2])
def test_a_tensor_ends_where_the_mapping_does(size: int) -> None:
    driver = Driver()
    made = fence.Fence(driver)
    pointers = [made.allocate(size, 0) for _ in range(3)]
    for pointer in pointers:
        ((begin, mapped),) = [(at, n) for at, n in driver.mapped.items() if at <= pointer < at + n]
        ((first, reserved),) = [(at, n) for at, n in driver.reserved.items() if at < begin < at + n]
        assert pointer % 16 == 0
        assert 0 <= begin + mapped - (pointer + size) < 16
        assert begin - first == first + reserved - (begin + mapped) == GRAIN  # not mapped
    for pointer in pointers:
        made.free(pointer)
    assert not driver.mapped
    assert not driver.reserved
    assert driver.created == 0


def test_a_driver_that_has_no_memory_is_named() -> None:
    driver = Driver()
    driver.cuMemCreate = lambda *arguments: 2
    with pytest.raises(MemoryError, match="cuMemCreate gave 2"):
        fence.Fence(driver).allocate(100, 0)
