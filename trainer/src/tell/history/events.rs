//! TensorBoard's event file: records framed by length and masked CRC-32C, each holding one protobuf `Event`.
//! Three messages with a handful of fields do not need a protobuf library.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    sink: BufWriter<File>,
}

impl EventFile {
    /// Creates a file of its own in `folder`: readers merge all files there, and drop what earlier files have beyond
    /// `resumed_step`.
    pub fn create(folder: &Path, resumed_step: i64) -> io::Result<Self> {
        let now = jiff::Timestamp::now();
        let name = format!("events.out.tfevents.{}.{}.finetune", now.as_second(), std::process::id());
        let mut file = Self { sink: BufWriter::new(File::create(folder.join(name))?) };
        // Event { wall_time = 1, file_version = 3 }
        let mut event = wall_time(now);
        bytes_field(&mut event, 3, b"brain.Event:2");
        file.record(&event)?;
        // Event { wall_time = 1, step = 2, session_log = 7 }, SessionLog { status = 1 }, START = 1
        let mut event = wall_time(now);
        event.push(2 << 3);
        varint(&mut event, resumed_step.unsigned_abs() + 1);
        bytes_field(&mut event, 7, &[1 << 3, 1]);
        file.record(&event)?;
        Ok(file)
    }

    /// Adds scalars of one step.
    pub fn scalars(&mut self, step: i64, values: &[(&str, f64)]) -> io::Result<()> {
        // Event { wall_time = 1, step = 2, summary = 5 }, Summary { value = 1 }, Value { tag = 1, simple_value = 2 }
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut entry = Vec::new();
            bytes_field(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend((*value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &entry);
        }
        let mut event = wall_time(jiff::Timestamp::now());
        event.push(2 << 3);
        varint(&mut event, step.unsigned_abs());
        bytes_field(&mut event, 5, &summary);
        self.record(&event)
    }

    /// Hands everything to the operating system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = length.to_vec();
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        // In one piece: a full disk may cost a whole record, never a part of one.
        self.sink.write_all(&record)
    }
}

fn wall_time(now: jiff::Timestamp) -> Vec<u8> {
    let seconds = now.as_microsecond() as f64 / 1e6;
    let mut event = vec![1 << 3 | 1];
    event.extend(seconds.to_le_bytes());
    event
}

fn varint(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push(value as u8 | 0x80);
        value >>= 7;
    }
    buffer.push(value as u8);
}

fn bytes_field(buffer: &mut Vec<u8>, field: u8, data: &[u8]) {
    buffer.push(field << 3 | 2);
    varint(buffer, data.len() as u64);
    buffer.extend(data);
}

/// CRC-32C, rotated and offset as the record format wants it.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_framed_and_hold_what_was_added() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut file = EventFile::create(folder.path(), 299).expect("writable");
        file.scalars(300, &[("train/loss", 1.5)]).expect("writable");
        file.flush().expect("writable");
        let path = std::fs::read_dir(folder.path()).expect("there").flatten().next().expect("one file").path();
        let mut bytes = &std::fs::read(path).expect("readable")[..];
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
            assert_eq!(bytes[8..12], masked_crc(&bytes[..8]).to_le_bytes());
            let data = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], masked_crc(data).to_le_bytes());
            records.push(data);
            bytes = &bytes[16 + length..];
        }
        assert_eq!(records.len(), 3);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // step 300 as a varint, then the session's start
        assert_eq!(records[1][9..], [2 << 3, 0xac, 0x02, 7 << 3 | 2, 2, 1 << 3, 1]);
        // step 300, then the summary with tag and value
        assert_eq!(records[2][9..12], [2 << 3, 0xac, 0x02]);
        assert!(records[2].ends_with(&[&b"\x0a\x0atrain/loss\x15"[..], &1.5f32.to_le_bytes()].concat()));
    }
}
