use super::reading::PIECE_BYTES;
use super::*;

fn sample() -> Vec<u8> {
    let (a, b) = ([1u8; 24], [2u8; 6]);
    let tensors = [
        TensorView { name: "b".into(), dtype: Dtype::BF16, shape: vec![3], data: &b },
        TensorView { name: "a".into(), dtype: Dtype::F32, shape: vec![2, 3], data: &a },
    ];
    let mut bytes = Vec::new();
    write_safetensors(&mut bytes, &[("format", "pt")], &tensors).expect("a Vec takes everything");
    bytes
}

fn folder(bytes: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("model.safetensors"), bytes).expect("writable");
    folder
}

#[test]
fn what_is_written_is_read_by_the_library_and_by_us() {
    let bytes = sample();
    let parsed = SafeTensors::deserialize(&bytes).expect("valid");
    assert_eq!(parsed.tensor("a").expect("a").shape(), [2, 3]);
    let folder = folder(&bytes);
    let files = WeightFiles::open(folder.path()).expect("valid");
    assert_eq!(files.names(), ["a", "b"]);
    let b = files.tensor("b").expect("b");
    assert_eq!((b.dtype, b.shape, b.data), (Dtype::BF16, vec![3], &[2u8; 6][..]));
}

#[test]
fn every_truncation_is_refused() {
    let bytes = sample();
    for length in 0..bytes.len() {
        let folder = folder(&bytes[..length]);
        let error = WeightFiles::open(folder.path()).expect_err("truncated");
        let expected = if length == 0 { "cannot be read" } else { "" };
        assert!(matches!(error, Error::Malformed { .. } | Error::Read { .. }), "{length}: {error} {expected}");
    }
}

#[test]
fn hostile_headers_are_refused() {
    let file = |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for (bytes, expected) in [
        ((u64::MAX).to_le_bytes().to_vec(), "the header says 18446744073709551615 bytes"),
        (file("{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,99]}}"), "not a valid safetensors file"),
        (file("{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[8,4]}}"), "not a valid safetensors file"),
        (
            file("{\"a\":{\"dtype\":\"F32\",\"shape\":[18446744073709551615,2],\"data_offsets\":[0,16]}}"),
            "not a valid safetensors file",
        ),
        (
            file(
                "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},\
                 \"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[4,16]}}",
            ),
            "not a valid safetensors file",
        ),
        (file(&deep), "not a valid safetensors file"),
    ] {
        let folder = folder(&bytes);
        let error = WeightFiles::open(folder.path()).expect_err("hostile").to_string();
        assert!(error.contains(expected) && error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn pickled_weights_are_named_and_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("pytorch_model.bin"), "x").expect("writable");
    let error = WeightFiles::open(folder.path()).expect_err("no safetensors").to_string();
    assert!(error.contains("only pytorch_model.bin; only safetensors weights are read"), "{error}");
}

#[test]
fn shards_may_not_leave_the_folder() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let index = r#"{"weight_map": {"a": "../model.safetensors"}}"#;
    std::fs::write(folder.path().join("model.safetensors.index.json"), index).expect("writable");
    let error = WeightFiles::open(folder.path()).expect_err("outside").to_string();
    assert!(error.contains("not a plain file name"), "{error}");
}

#[test]
fn a_file_is_read_whole_and_weights_that_are_no_numbers_are_refused() {
    // The second tensor ends in a piece that is not full, and the last one is no weight of the model.
    const ELEMENTS: usize = PIECE_BYTES + 3;
    let read = |dtype: Dtype, element: &[u8], place: usize| {
        let mut data = vec![0; element.len() * ELEMENTS];
        data[place * element.len()..][..element.len()].copy_from_slice(element);
        let nan = [0xff; 8];
        let tensor = |name: &str, dtype, shape, data| TensorView { name: name.into(), dtype, shape: vec![shape], data };
        let tensors = [
            tensor("first", dtype, 1, &data[..element.len()]),
            tensor("second", dtype, ELEMENTS, &data),
            tensor("unused", Dtype::BF16, 4, &nan),
            tensor("without elements", dtype, 0, &[]),
        ];
        let mut file = Vec::new();
        write_safetensors(&mut file, &[], &tensors).expect("a vector takes everything");
        let folder = folder(&file);
        let files = WeightFiles::open(folder.path()).expect("valid");
        let mut seen = Vec::new();
        let result =
            files.files()[0].read_through(&|name| name != "unused", &mut |piece| seen.extend_from_slice(piece));
        result.map(|()| assert!(seen == file, "not what is in the file"))
    };
    let halves = |bits: [u16; 4]| bits.map(|bits| bits.to_le_bytes().to_vec());
    let infinite = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN].map(|value| value.to_le_bytes().to_vec());
    for (dtype, largest, refused) in [
        (Dtype::BF16, 0x7f7f_u16.to_le_bytes().to_vec(), halves([0x7f80, 0xff80, 0x7fc0, 0xffff])),
        (Dtype::F16, 0xfbff_u16.to_le_bytes().to_vec(), halves([0x7c00, 0xfc00, 0x7e00, 0xfc01])),
        (Dtype::F32, f32::MIN.to_le_bytes().to_vec(), infinite),
        (Dtype::I64, (-1_i64).to_le_bytes().to_vec(), Default::default()),
    ] {
        read(dtype, &largest, ELEMENTS - 1).unwrap_or_else(|error| panic!("{error}"));
        for bytes in refused.iter().filter(|bytes| !bytes.is_empty()) {
            // In the first place it is in the first tensor, too.
            for (place, name) in [(0, "first"), (PIECE_BYTES / 2, "second"), (ELEMENTS - 1, "second")] {
                let error = read(dtype, bytes, place).expect_err("no number").to_string();
                let expected = format!("model.safetensors: tensor {name} holds NaN or infinite values");
                assert!(error.contains(&expected), "{bytes:?} at {place}: {error}");
            }
        }
    }
}

#[test]
fn a_file_that_has_grown_is_refused() {
    let mut bytes = sample();
    let folder = folder(&bytes);
    let files = WeightFiles::open(folder.path()).expect("valid");
    bytes.push(0);
    std::fs::write(folder.path().join("model.safetensors"), &bytes).expect("writable");
    let error = files.files()[0].read_through(&|_| true, &mut |_| ()).expect_err("longer").to_string();
    assert!(error.contains("it has grown since it was opened"), "{error}");
}
