//! `tojson` of templates: `json.dumps` of Python.

use minijinja::ErrorKind;
use minijinja::value::{Kwargs, Value};
use serde_json::ser::Formatter;

/// Columns that `tojson` may indent by.
const MAX_INDENT: usize = 64;

/// `json.dumps` of Python: `", "` and `": "`, nothing escaped for HTML, non-ASCII kept; `indent`, `sort_keys` and
/// `separators` honoured.
#[expect(clippy::needless_pass_by_value, reason = "minijinja's filters take their arguments by value")]
pub(super) fn python_json(value: &Value, kwargs: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent").ok().flatten();
    if let Some(indent) = indent.filter(|indent| *indent > MAX_INDENT) {
        let message = format!("tojson(indent={indent}), at most {MAX_INDENT} is accepted");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    let sort_keys: bool = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let invalid = |error: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string());
    let mut json = serde_json::to_value(value).map_err(invalid)?;
    if sort_keys {
        json.sort_all_objects();
    }
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let mut bytes = Vec::new();
    let formatter = PythonFormatter { item, key, indent, depth: 0, has_value: false };
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    serde::Serialize::serialize(&json, &mut serializer).map_err(invalid)?;
    Ok(String::from_utf8(bytes).expect("serde_json writes UTF-8"))
}

struct PythonFormatter {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    has_value: bool,
}

impl PythonFormatter {
    fn begin<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, open: u8) -> std::io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(&[open])
    }

    fn end<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, close: u8) -> std::io::Result<()> {
        self.depth -= 1;
        if self.has_value {
            self.new_line(writer)?;
        }
        writer.write_all(&[close])
    }

    fn separate<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            writer.write_all(self.item.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn new_line<W: ?Sized + std::io::Write>(&self, writer: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{}", " ".repeat(width * self.depth)),
            None => Ok(()),
        }
    }
}

impl Formatter for PythonFormatter {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'[')
    }

    fn end_array<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b']')
    }

    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.begin(writer, b'{')
    }

    fn end_object<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        self.end(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(self.key.as_bytes())
    }

    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}
