//! YAML as JSON values that remember where they stood: for messages with line and column.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

/// Line and column, counted from 1.
pub type Position = (u64, u64);

/// A parsed document.
#[derive(Debug)]
pub struct Document {
    /// Its value; scalars keep the type that YAML gives them.
    pub value: Value,
    /// Where each value stands, by JSON pointer.
    positions: HashMap<String, Position>,
}

impl Document {
    /// Parses one document; duplicate keys and `.nan` are refused.
    pub fn parse(text: &str) -> Result<Self, serde_saphyr::Error> {
        let Spanned { value, defined, .. } = serde_saphyr::from_str::<Spanned<Node>>(text)?;
        let mut positions = HashMap::new();
        let value = value.into_value("", (defined.line(), defined.column()), &mut positions);
        Ok(Self { value, positions })
    }

    /// Where the value at a JSON pointer stands, or the nearest value around it.
    pub fn position(&self, pointer: &str) -> Position {
        let mut pointer = pointer;
        loop {
            if let Some(position) = self.positions.get(pointer) {
                return *position;
            }
            match pointer.rfind('/') {
                Some(end) => pointer = &pointer[..end],
                None => return (1, 1),
            }
        }
    }
}

enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl Node {
    fn into_value(self, pointer: &str, position: Position, positions: &mut HashMap<String, Position>) -> Value {
        positions.insert(pointer.to_owned(), position);
        let place = |node: &Spanned<Node>| (node.defined.line(), node.defined.column());
        match self {
            Self::Scalar(value) => value,
            Self::List(items) => items
                .into_iter()
                .enumerate()
                .map(|(index, node)| {
                    let position = place(&node);
                    node.value.into_value(&format!("{pointer}/{index}"), position, positions)
                })
                .collect(),
            Self::Map(entries) => {
                let mut map = Map::new();
                for (key, node) in entries {
                    let position = match &node.value {
                        // A nested block is found by its key.
                        Self::Scalar(_) => place(&node),
                        Self::List(_) | Self::Map(_) => (key.defined.line(), key.defined.column()),
                    };
                    let name = key.value;
                    let below = format!("{pointer}/{}", name.replace('~', "~0").replace('/', "~1"));
                    let value = node.value.into_value(&below, position, positions);
                    map.insert(name, value);
                }
                Value::Object(map)
            }
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Node, E> {
        let number =
            Number::from_f64(value).ok_or_else(|| E::custom("a number that is not finite; expected a finite one"))?;
        Ok(Node::Scalar(Value::Number(number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut map: Vec<(Spanned<String>, Spanned<Node>)> = Vec::new();
        while let Some((key, value)) = entries.next_entry::<Spanned<String>, Spanned<Node>>()? {
            if map.iter().any(|(other, _)| other.value == key.value) {
                return Err(A::Error::custom(format!("key {} appears twice", key.value)));
            }
            map.push((key, value));
        }
        Ok(Node::Map(map))
    }
}
