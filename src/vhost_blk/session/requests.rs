//! The vhost-user requests, one function each.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandler};

use crate::sync::Arc;
use crate::sys::allowance::Allowance;
use crate::sys::fd::EventFd;
use crate::sys::mmap::{Region, is_memory};
use crate::vhost_blk::mailbox::Message;
use crate::virtio::blk;
use crate::virtio::queue::QUEUE_SIZE_MAX;

use super::{MEM_SLOTS_MAX, RingHvas, Session, refused};

/// Where a region is mapped: for postcopy, which is not offered.
type RegionBase = vhost::VhostUserMemoryRegionBase;

fn map(allowance: &Allowance, region: &VhostUserMemoryRegion, file: &File) -> Result<Region> {
    let VhostUserMemoryRegion {
        guest_phys_addr,
        memory_size,
        user_addr,
        mmap_offset,
    } = *region;
    let (gpa, len, hva) = (guest_phys_addr, memory_size, user_addr);
    Region::map_for(allowance, file, gpa, len, hva, mmap_offset).map_err(Error::ReqHandlerError)
}

impl Session {
    /// Whether `file` may be guest memory. To be asked before anything else is done with it.
    fn check_memory(&self, file: &File) -> Result<()> {
        if self.any_memory || is_memory(file) {
            return Ok(());
        }
        (self.heard)();
        let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let name = name.unwrap_or_default();
        Err(refused(format!(
            "guest memory is in {}, which is not a memfd and not on tmpfs or hugetlbfs, and may \
             hang or fail under whoever touches it (QEMU: -object memory-backend-memfd,share=on; \
             Cloud Hypervisor: --memory shared=on; or serve with --any-memory)",
            name.display()
        )))
    }
}

fn adopt(file: Option<File>) -> Result<Option<Arc<EventFd>>> {
    let event = file.map(|file| EventFd::adopt(file.into())).transpose();
    Ok(event.map_err(Error::ReqHandlerError)?.map(Arc::new))
}

impl VhostUserBackendReqHandler for Session {
    /// "Issued when a new connection is established", and when QEMU plugs another device into the
    /// connection of one that was unplugged: it forgot the former device, and so do we.
    fn set_owner(&self) -> Result<()> {
        self.lock().renew()
    }

    fn reset_owner(&self) -> Result<()> {
        // Deprecated; QEMU's own back ends treat it as nothing.
        drop(self.lock());
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        self.lock().reset();
        Ok(())
    }

    fn get_features(&self) -> Result<u64> {
        Ok(self.lock().offered())
    }

    fn set_features(&self, features: u64) -> Result<()> {
        let mut state = self.lock();
        if features & !state.offered() != 0 {
            return Err(Error::FeatureMismatch);
        }
        if features != state.features && state.vrings.iter().any(|v| v.running.is_some()) {
            return Err(Error::InvalidOperation("features change while a ring runs"));
        }
        state.features = features;
        if !state.has_protocol_features() {
            state
                .vrings
                .iter_mut()
                .for_each(|vring| vring.is_enabled = true);
            for index in 0..u32::from(state.device.queues_max) {
                state.start_if_ready(index)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<RegionBase>>> {
        files.iter().try_for_each(|file| self.check_memory(file))?;
        let mut state = self.lock();
        let regions: Result<Vec<Region>> = table
            .iter()
            .zip(files)
            .map(|(region, file)| map(&state.allowance, region, &file))
            .collect();
        state.set_regions(regions?)?;
        Ok(None)
    }

    fn set_vring_num(&self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_large| Error::InvalidParam)?;
        if !size.is_power_of_two() || size > QUEUE_SIZE_MAX {
            return Err(Error::InvalidParam);
        }
        self.lock().change(index, |vring| vring.size = size)
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        desc: u64,
        used: u64,
        avail: u64,
        _log: u64,
    ) -> Result<()> {
        self.lock().change(index, |vring| {
            vring.at = Some(RingHvas { desc, avail, used });
        })
    }

    fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_large| Error::InvalidParam)?;
        self.lock().change(index, |vring| vring.base = base)
    }

    /// Drains the ring first: when the client has the answer, no request is in flight. What waits
    /// for space is not waited for: it is left out of the base if it can be, else it fails.
    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let mut state = self.lock();
        state.stop(index)?;
        let vring = state.vring(index)?;
        vring.kick = None;
        vring.call = None;
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&self, index: u8, fd: Option<File>) -> Result<()> {
        // Without one (bit 8 of the message) the ring would have to be polled for ever. The
        // client is told by REPLY_ACK, if it asked, and by the end of the session.
        let kick = adopt(fd)?.ok_or(Error::InvalidParam)?;
        self.lock()
            .change(index.into(), |vring| vring.kick = Some(kick))
    }

    fn set_vring_call(&self, index: u8, fd: Option<File>) -> Result<()> {
        let call = adopt(fd)?;
        let mut state = self.lock();
        let vring = state.vring(index.into())?;
        vring.call.clone_from(&call);
        if let Some(running) = &vring.running {
            running.worker.post(Message::Call {
                lane: running.lane,
                call,
            });
        }
        Ok(())
    }

    fn set_vring_err(&self, index: u8, fd: Option<File>) -> Result<()> {
        let error = adopt(fd)?;
        let mut state = self.lock();
        let vring = state.vring(index.into())?;
        vring.error.clone_from(&error);
        if let Some(running) = &vring.running {
            running.worker.post(Message::Error {
                lane: running.lane,
                error,
            });
        }
        Ok(())
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        drop(self.lock());
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            Err(Error::FeatureMismatch)
        } else {
            Ok(())
        }
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(self.lock().device.queues_max.into())
    }

    fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        let mut state = self.lock();
        if state.vring(index)?.is_enabled == enable {
            return Ok(());
        }
        state.change(index, |vring| vring.is_enabled = enable)
    }

    fn get_config(&self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.lock().device.config().read(offset, size))
    }

    fn set_config(&self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let state = self.lock();
        let writeback = blk::written_writeback(offset, buf).ok_or(Error::InvalidParam)?;
        state.device.set_writeback(writeback);
        Ok(())
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        drop(self.lock());
        u64::try_from(MEM_SLOTS_MAX).map_err(|_large| Error::BackendInternalError)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<RegionBase>> {
        self.check_memory(&file)?;
        let mut state = self.lock();
        let mut regions = state.regions.clone();
        // One that is there already takes the former's place.
        let (gpa, len, hva) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        regions.retain(|held| !held.is_at(gpa, len, hva));
        if regions.len() >= MEM_SLOTS_MAX {
            return Err(refused("all memory slots are in use"));
        }
        regions.push(map(&state.allowance, region, &file)?);
        state.set_regions(regions)?;
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let VhostUserMemoryRegion {
            guest_phys_addr,
            memory_size,
            user_addr,
            ..
        } = **region;
        let mut state = self.lock();
        let mut regions = state.regions.clone();
        let is_it = |held: &Region| held.is_at(guest_phys_addr, memory_size, user_addr);
        let at = regions
            .iter()
            .position(is_it)
            .ok_or_else(|| refused("no such region"))?;
        regions.remove(at);
        state.set_regions(regions)
    }

    fn set_gpu_socket(&self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU"))
    }

    fn get_shared_object(&self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("inflight tracking was not offered"))
    }

    fn set_inflight_fd(&self, _: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("inflight tracking was not offered"))
    }

    fn set_device_state_fd(
        &self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state was not offered"))
    }

    fn check_device_state(&self) -> Result<()> {
        Err(Error::InvalidOperation("device state was not offered"))
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation(
            "shared memory regions were not offered",
        ))
    }

    fn set_log_base(&self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("logging was not offered"))
    }
}
