//! NVIDIA GPUs as the driver's management library shows them. It is loaded if it is there; a machine without it has none.

use nvml_wrapper::Nvml;

use crate::compute::shim::cuda::library;

/// The GPUs that this process may see.
#[derive(Debug)]
pub struct Gpus(Nvml);

/// What one GPU says; a GPU that does not tell something (a part of one, an old one) leaves it out.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Its number.
    pub device: String,
    /// Memory that is taken, bytes.
    pub memory_bytes: Option<f64>,
    /// Share of the last moments in which it computed.
    pub utilization: Option<f64>,
    /// Energy since the driver was loaded.
    pub joules: Option<f64>,
}

impl Gpus {
    /// Loads the library; `None` where there is no driver.
    pub fn open() -> Option<Self> {
        // Containers get the library under this name only.
        Nvml::builder().lib_path(library("libnvidia-ml.so.1").as_os_str()).init().ok().map(Self)
    }

    /// Asks each GPU.
    pub fn read(&self) -> Vec<Reading> {
        let count = self.0.device_count().unwrap_or(0);
        let read = |index: u32| {
            let device = self.0.device_by_index(index).ok()?;
            Some(Reading {
                device: index.to_string(),
                memory_bytes: device.memory_info().ok().map(|memory| memory.used as f64),
                utilization: device.utilization_rates().ok().map(|rates| f64::from(rates.gpu) / 100.0),
                joules: device.total_energy_consumption().ok().map(|millijoules| millijoules as f64 / 1e3),
            })
        };
        (0..count).filter_map(read).collect()
    }

    /// Energy of all GPUs since the driver was loaded; `None` where none tells.
    pub fn joules(&self) -> Option<f64> {
        self.read().into_iter().filter_map(|reading| reading.joules).reduce(|sum, joules| sum + joules)
    }
}
