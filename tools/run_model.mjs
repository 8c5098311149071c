// node run_model.mjs onnxruntime-node|onnxruntime-web MODEL.onnx OPTIONS.json INPUT.f32 1,3,32,32 OUTPUT.f32
import { readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";

const [, , runtime, model, options, input, dims, output] = process.argv;
const ort = createRequire(join(process.cwd(), "package.json"))(runtime);
const session = await ort.InferenceSession.create(await readFile(model), JSON.parse(await readFile(options, "utf8")));
const bytes = await readFile(input);
const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
const x = new ort.Tensor("float32", values, dims.split(",").map(Number));
const results = await session.run({ [session.inputNames[0]]: x });
const scores = results[session.outputNames[0]].data;
await writeFile(output, Buffer.from(scores.buffer, scores.byteOffset, scores.byteLength));
process.exit(0);
