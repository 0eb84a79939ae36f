//! What VMMs say to a vhost-user-blk back end, in the order they say it. One queue is used, as by a
//! guest with one CPU; where a VMM announces two, the second stays without a ring.

use super::Base::{Avail, Told, Used, Zero};
use super::Step::{
    AddRegion, Addr, Answered, Base, Call, Config, Connect, Enable, Err, Fresh, GetFeatures,
    GetProtocol, Io, Kick, Leave, MaxSlots, MemTable, Num, Owner, Post, QueueNum, Restart,
    SetFeatures, SetProtocol, Stop,
};
use super::{Acks, Script, Step};

/// What firmware accepts: no second queue, no write cache to turn off.
const SEABIOS: u64 = 0x1_4000_0046;
const LINUX: u64 = 0x1_7000_7E46;

/// The connection, and the device plugged into it: at the start, by device_add, and after a hang-up
/// (reconnect=1), less GET_CONFIG in the last case.
const QEMU_PLUG: &[Step] = &[
    GetFeatures,
    GetProtocol,
    SetProtocol(0xA209),
    QueueNum,
    MaxSlots,
    Owner,
    GetFeatures,
    Call(0),
    Err(0),
    Call(1),
    Err(1),
];
/// DRIVER_OK, or running again. Memory is sent where it is not there by QEMU's own books.
const QEMU_FEATURES: &[Step] = &[SetFeatures(LINUX), Call(0), Call(1), SetFeatures(LINUX)];
const QEMU_RING: &[Step] = &[Num(0)];
const QEMU_GO: &[Step] = &[Addr(0), Kick(0), Enable(0, true), Enable(1, true)];
const QEMU_STOP: &[Step] = &[Enable(0, false), Enable(1, false), Stop(0)];
const QEMU_SEABIOS: &[Step] = &[
    Fresh,
    SetFeatures(SEABIOS),
    Call(0),
    Call(1),
    SetFeatures(SEABIOS),
];

const CH_CONNECT: &[Step] = &[Connect, Owner, GetFeatures];
const CH_ACTIVATE: &[Step] = &[SetFeatures(0x1_7000_7E46), MemTable, Num(0), Addr(0)];
const CH_GO: &[Step] = &[Call(0), Kick(0), Enable(0, true)];
const CH_PROTOCOL: Step = SetProtocol(0x8_9003 | 0x208);

const CROSVM_ACTIVATE: &[Step] = &[MemTable, Num(0), Addr(0)];
const CROSVM_GO: &[Step] = &[Call(0), Kick(0), Enable(0, true)];
const CROSVM_STOP: &[Step] = &[Enable(0, false), Stop(0)];

pub(super) const SCRIPTS: &[Script] = &[
    Script {
        vmm: "QEMU: boot with firmware, stop, cont, system_reset",
        source: "recorded from qemu-system-x86_64 7.2.22 with a Linux guest, 2026-11-28",
        acks: Acks::Memory,
        steps: &[
            &[Connect],
            QEMU_PLUG,
            &[Config(57)],
            QEMU_SEABIOS,
            &[AddRegion],
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            QEMU_STOP,
            &[Fresh],
            QEMU_FEATURES,
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            // stop and cont; what the guest made available meanwhile is served
            QEMU_STOP,
            &[Post(3)],
            QEMU_FEATURES,
            QEMU_RING,
            &[Base(0, Told)],
            QEMU_GO,
            &[Answered, Io],
            // system_reset
            QEMU_STOP,
            QEMU_SEABIOS,
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            QEMU_STOP,
            &[Fresh],
            QEMU_FEATURES,
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            QEMU_STOP,
            &[Leave],
        ],
        corrected: 0,
    },
    Script {
        vmm: "QEMU: device_del and device_add on one chardev, twice",
        source: "recorded from qemu-system-x86_64 7.2.22 with a Linux guest, 2026-11-28",
        acks: Acks::Memory,
        steps: &[
            &[Connect],
            QEMU_PLUG,
            &[Config(57), Fresh],
            QEMU_FEATURES,
            &[AddRegion],
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            // No REM_MEM_REG: the device that is unplugged takes its list of regions with it.
            QEMU_STOP,
            QEMU_PLUG,
            &[Config(57), Fresh],
            QEMU_FEATURES,
            &[AddRegion],
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
            QEMU_STOP,
            QEMU_PLUG,
            &[Config(57), Fresh],
            QEMU_FEATURES,
            &[AddRegion],
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io],
        ],
        corrected: 0,
    },
    Script {
        vmm: "QEMU: the server restarted under a guest, reconnect=1",
        source: "recorded from qemu-system-x86_64 7.2.22 with a Linux guest, 2026-11-28",
        acks: Acks::Memory,
        steps: &[
            &[Connect],
            QEMU_PLUG,
            &[Config(57), Fresh],
            QEMU_FEATURES,
            &[AddRegion],
            QEMU_RING,
            &[Base(0, Zero)],
            QEMU_GO,
            &[Io, Restart, Post(3), Connect],
            QEMU_PLUG,
            QEMU_FEATURES,
            &[AddRegion],
            QEMU_RING,
            // GET_VRING_BASE had no answer: it goes by the used index.
            &[Base(0, Used)],
            QEMU_GO,
            &[Answered, Io],
        ],
        corrected: 0,
    },
    Script {
        vmm: "Cloud Hypervisor: boot, pause, resume, reset",
        source: "virtio-devices/src/vhost_user, commit ae44c2971c83",
        acks: Acks::All,
        steps: &[
            CH_CONNECT,
            &[GetProtocol, CH_PROTOCOL, QueueNum, Config(60), Fresh],
            CH_ACTIVATE,
            &[Base(0, Zero)],
            CH_GO,
            &[Io],
            // pause, and resume
            &[Enable(0, false), Post(2), Enable(0, true), Answered],
            // a reset by the guest
            &[Enable(0, false), Stop(0), Fresh],
            CH_ACTIVATE,
            &[Base(0, Avail)],
            CH_GO,
            &[Io, Leave],
        ],
        corrected: 0,
    },
    Script {
        vmm: "Cloud Hypervisor: the server restarted under load",
        source: "reinitialize_vhost_user of the same; base 72 where used was 64 was measured",
        acks: Acks::All,
        steps: &[
            CH_CONNECT,
            &[GetProtocol, CH_PROTOCOL, QueueNum, Config(60), Fresh],
            CH_ACTIVATE,
            &[Base(0, Zero)],
            CH_GO,
            &[Io, Restart, Post(8)],
            CH_CONNECT,
            &[CH_PROTOCOL],
            CH_ACTIVATE,
            &[Base(0, Avail)],
            CH_GO,
            &[Answered, Io],
        ],
        corrected: 1,
    },
    Script {
        vmm: "Cloud Hypervisor: snapshot and restore",
        source: "setup_vhost_user of the same, without DEVICE_STATE",
        acks: Acks::All,
        steps: &[
            CH_CONNECT,
            &[GetProtocol, CH_PROTOCOL, QueueNum, Config(60), Fresh],
            CH_ACTIVATE,
            &[Base(0, Zero)],
            CH_GO,
            &[Io, Enable(0, false), Post(5), Leave],
            CH_CONNECT,
            &[CH_PROTOCOL],
            CH_ACTIVATE,
            &[Base(0, Avail)],
            CH_GO,
            &[Answered, Io],
        ],
        corrected: 1,
    },
    Script {
        vmm: "crosvm: boot, sleep, wake, reset",
        source: "devices/src/virtio/vhost_user_frontend/mod.rs, commit f1e797a68dad",
        acks: Acks::None,
        steps: &[
            &[Connect, Owner, GetFeatures, GetProtocol],
            &[
                SetProtocol(0x8_0229 | 0x10_0000),
                QueueNum,
                Config(60),
                Fresh,
            ],
            &[SetFeatures(LINUX)],
            CROSVM_ACTIVATE,
            &[Base(0, Zero)],
            CROSVM_GO,
            &[Io],
            CROSVM_STOP,
            &[Post(2)],
            CROSVM_ACTIVATE,
            &[Base(0, Told)],
            CROSVM_GO,
            &[Answered, Io],
            CROSVM_STOP,
            &[Fresh],
            CROSVM_ACTIVATE,
            &[Base(0, Zero)],
            CROSVM_GO,
            &[Io],
        ],
        corrected: 0,
    },
    Script {
        vmm: "libblkio: a connection, and the next",
        source: "crate virtio-driver 0.6.1, src/transports/vhost_user.rs",
        acks: Acks::All,
        steps: &[LIBBLKIO, &[Leave], LIBBLKIO],
        corrected: 0,
    },
];

const LIBBLKIO: &[Step] = &[
    Connect,
    Owner,
    GetFeatures,
    SetFeatures(0x1_6000_0200),
    GetProtocol,
    SetProtocol(0x8209),
    QueueNum,
    MaxSlots,
    Config(60),
    Fresh,
    AddRegion,
    Num(0),
    Base(0, Zero),
    Addr(0),
    Kick(0),
    Call(0),
    Enable(0, true),
    Io,
];
