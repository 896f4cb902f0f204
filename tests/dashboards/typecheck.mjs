// node typecheck.mjs FOLDER DASHBOARD.json …: dashboards against Grafana's types, from the folder that
// tools/grafana-schema.sh prints. `Dashboard` knows the outer shape only, so the options and field settings of each panel
// are held against the types of its kind, too. Whether a panel then shows what it should, only a Grafana can say.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const [folder, ...dashboards] = process.argv.slice(2);
if (dashboards.length === 0) throw new Error('usage: node typecheck.mjs FOLDER DASHBOARD.json …');

const kinds = {
  bargauge: 'BarGauge', gauge: 'Gauge', stat: 'Stat', 'state-timeline': 'StateTimeline',
  table: 'Table', timeseries: 'TimeSeries', xychart: 'XYChart',
};
// These types name the settings of a field `FieldConfig`; the others take none.
const withFields = new Set(['StateTimeline', 'TimeSeries', 'XYChart']);

// Enums of the types are strings in JSON; what has a default may be left out.
const lines = [
  "import type { Dashboard } from '@grafana/schema';",
  'type Plain<T> = T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;',
];
for (const [kind, name] of Object.entries(kinds)) {
  const path = `@grafana/schema/dist/esm/raw/composable/${kind.replaceAll('-', '')}/panelcfg/x/${name}PanelCfg_types.gen`;
  lines.push(`import type * as ${name} from '${path}';`);
}
dashboards.forEach((path, number) => {
  const dashboard = JSON.parse(readFileSync(path, 'utf8'));
  lines.push(`export const dashboard${number}: Plain<Dashboard> = ${JSON.stringify(dashboard, null, 1)};`);
  for (const panel of dashboard.panels.filter((panel) => panel.type !== 'row')) {
    const name = kinds[panel.type];
    if (!name) throw new Error(`${path}: panel "${panel.title}" is of the kind ${panel.type}, of which typecheck.mjs has no types`);
    const id = `dashboard${number}_panel${panel.id}`;
    lines.push(`export const ${id}: Plain<Partial<${name}.Options>> = ${JSON.stringify(panel.options)}; // ${panel.title}`);
    const custom = panel.fieldConfig.defaults.custom;
    if (custom && !withFields.has(name)) throw new Error(`${path}: panel "${panel.title}" sets fieldConfig.defaults.custom, which ${panel.type} does not have`);
    if (custom) lines.push(`export const ${id}_field: Plain<${name}.FieldConfig> = ${JSON.stringify(custom)}; // ${panel.title}`);
  }
});

const work = mkdtempSync(join(folder, 'check-'));
try {
  const file = join(work, 'dashboards.ts');
  writeFileSync(file, lines.join('\n') + '\n');
  const options = ['--noEmit', '--strict', '--skipLibCheck', '--module', 'nodenext', '--moduleResolution', 'nodenext'];
  const result = spawnSync(process.execPath, [join(folder, 'node_modules/typescript/bin/tsc'), ...options, file], { stdio: 'inherit' });
  process.exitCode = result.status ?? 1;
} finally {
  rmSync(work, { recursive: true });
}
