// node run_model.mjs onnxruntime-node|onnxruntime-web CASES.json
// Run every model of [{model, input, dims, output}], and write its first output as float32, or what went wrong as output + ".error".
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

const [, , runtime, cases] = process.argv;
const ort = createRequire(join(process.cwd(), "package.json"))(runtime);
for (const { model, input, dims, output } of JSON.parse(await readFile(cases, "utf8"))) {
  try {
    const session = await ort.InferenceSession.create(await readFile(model));
    const bytes = await readFile(input);
    const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
    const results = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", values, dims) });
    const scores = results[session.outputNames[0]].data;
    await writeFile(output, Buffer.from(scores.buffer, scores.byteOffset, scores.byteLength));
    await session.release();
  } catch (error) {
    await writeFile(`${output}.error`, `${error}`);
  }
}
process.exit(0);
