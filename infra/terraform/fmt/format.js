// node format.js [--check] FILE...   writes each file as `terraform fmt` would, or says which ones differ
import { readFile, writeFile } from "node:fs/promises";
import hcl from "@cdktf/hcl-tools";

const check = process.argv.includes("--check");
const files = process.argv.slice(2).filter((argument) => argument !== "--check");
let differing = 0;
for (const file of files) {
  const text = await readFile(file, "utf8");
  const formatted = await hcl.format(text);
  if (formatted === text) continue;
  differing += 1;
  console.log(check ? `${file}: is not formatted` : `${file}: formatted`);
  if (!check) await writeFile(file, formatted);
}
process.exit(check && differing ? 1 : 0);
