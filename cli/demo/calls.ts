/** The calls that `calltape demo` plays: what was said, and how each one is to go. Data only; sample-run.ts plays them. */

export interface SampleCall {
  /** The end of its call_sid. */
  name: string
  /** BCP 47. */
  language: string
  provider: string
  direction: 'inbound' | 'outbound'
  from: string
  to: string
  /** A line a turn, `speaker: text`, with speakers called as their producers call them. A turn that ends in — was interrupted. */
  script: string
  /** What the bot noted down, by the number of the turn behind which it is sent. */
  notes?: Record<number, { data?: Record<string, unknown>; stage?: string; objections?: string[] }>
  /** `drops`: the connection is lost in the middle. `hangs up`: it is lost for good, and nobody says that the call ended. */
  fate: 'normal' | 'drops' | 'hangs up'
  /** What call.ended says. Absent when the call hangs up. */
  ending?: { reason: string; outcome: string }
  /** How long playing it takes. */
  playMs: number
}

const STOCKTAKING_ITEMS = 148

/** A long one: somebody reads serial numbers to a bot, which repeats them. */
function stocktaking(): string {
  const lines = [
    'bot: Stock line, good afternoon. Please read the serial numbers one by one, I repeat each of them.',
    'user: Good afternoon. This is Ravi from the Pune warehouse, aisle 14. Starting now.',
  ]
  for (let item = 1; item <= STOCKTAKING_ITEMS; item++) {
    const serial = `${String.fromCharCode(65 + ((item * 7) % 26))}${(item * 7919) % 10_000}-${(item * 31) % 97}`
    lines.push(
      `user: Item ${item}: ${serial}.`,
      `bot: ${serial}, noted.${item % 25 === 0 ? ` That makes ${item}.` : ''}`,
    )
  }
  lines.push('user: That was the last one.', `bot: Thank you, Ravi: ${STOCKTAKING_ITEMS} items are in the list.`)
  return lines.join('\n')
}

export const SAMPLE_CALLS: readonly SampleCall[] = [
  {
    name: 'ta',
    language: 'ta-IN',
    provider: 'exotel',
    direction: 'outbound',
    from: '+914440001122',
    to: '+919840012345',
    script: `
ai: வணக்கம், நான் அன்பு மருத்துவமனையிலிருந்து அழைக்கிறேன். நாளைய சந்திப்பை உறுதி செய்யலாமா?
user: வணக்கம். ஆமாம், காலை பத்து மணிக்குத்தானே?
ai: ஆம், டாக்டர் மீனா அவர்களுடன் காலை பத்து மணிக்கு.
user: கொஞ்சம் தாமதமாக வரலாமா? Office-ல ஒரு meeting இருக்கு.
ai: நிச்சயமாக. பதினொன்றரை மணி காலியாக உள்ளது. அது உங்களுக்கு வசதியா?
user: சரி, பதினொன்றரை நல்லது.
ai: மாற்றிவிட்டேன். பழைய அறிக்கைகளைக் கொண்டு வாருங்கள்.
user: சரி, ஆனால் ஒரு நிமிடம் — ஹலோ? கேட்கிறதா?`,
    fate: 'hangs up',
    playMs: 5000,
  },
  {
    name: 'en',
    language: 'en-US',
    provider: 'twilio',
    direction: 'outbound',
    from: '+14155550100',
    to: '+14155550142',
    script: `
bot: Hi, this is Maya from Brightside Solar. Am I speaking with Mr. Alvarez?
caller: Yes, this is Tom. What's this about?
bot: You asked on our website what a rooftop system would cost. Do you have two minutes?
caller: Two, yes. I'm about to pick up my kids.
bot: Then I'll be quick. What do you pay for electricity in a month, roughly?
caller: About $240. In August it was three hundred and something.
bot: And the roof: does it face south, and how old is it?
caller: South-west. We had it redone in 2019.
bot: That's ideal. For a house like yours it's usually around $18,500 before the tax credit.
caller: Ouch. That's more than I thought.
bot: After the 30% credit it's about $12,950, or $119 a month; that's half your bill today.
caller: Okay… and what happens if we move?
bot: The system raises the value of the house, or the contract moves to the new owner.
caller: Hm. I'd want to see that in writing.
bot: Of course. An engineer can look at the roof on Thursday at 5 and bring it along. Shall I book that?
caller: Thursday's fine. Send me a text.`,
    notes: {
      5: { data: { monthly_bill_usd: 240, decision_maker: true }, stage: 'qualification' },
      7: { data: { roof: { faces: 'south-west', redone: 2019 } } },
      9: { stage: 'pricing', objections: ['too expensive'] },
      13: { objections: ['moving house', 'wants it in writing'] },
      15: { data: { visit: 'Thursday 17:00' }, stage: 'booked' },
    },
    fate: 'normal',
    ending: { reason: 'completed', outcome: 'booked' },
    playMs: 8500,
  },
  {
    name: 'hi',
    language: 'hi-IN',
    provider: 'exotel',
    direction: 'outbound',
    from: '+918047101234',
    to: '+919876501234',
    script: `
agent: नमस्ते, मैं सुरक्षा हेल्थ से प्रिया बोल रही हूँ। क्या मेरी बात राजेश जी से हो रही है?
customer: हाँ जी, बोलिए।
agent: सर, आपकी health insurance policy 30 तारीख को expire हो रही है। क्या मैं renewal में मदद कर सकती हूँ?
customer: अच्छा, हाँ। पर इस बार premium कितना है?
agent: पिछले साल ₹18,450 था, इस साल ₹19,900 है, क्योंकि आपका age band बदल गया है।
customer: ये तो थोड़ा ज़्यादा लग रहा है। कोई discount नहीं मिलेगा?
agent: मिल सकता है, सर। दो साल का एक साथ pay करें तो 7.5% की छूट है।
customer: और मेरी mother को add करना हो तो? उनको diabetes है।
agent: बिल्कुल add कर सकते हैं। Pre-existing disease के लिए दो साल का waiting period रहेगा।
customer: ठीक है, तो मुझे WhatsApp पर दोनों quotes भेज दीजिए।
agent: ज़रूर। आपका WhatsApp number यही है, आख़िर में 1234?
customer: हाँ, यही है। मैं शाम को wife से बात करके बताता हूँ।
agent: धन्यवाद राजेश जी। मैं कल सुबह 11 बजे call करूँगी। शुभ दिन!
customer: ठीक है, धन्यवाद।`,
    notes: {
      5: { stage: 'negotiation', objections: ['premium बहुत ज़्यादा'] },
      11: { data: { callback: 'कल 11 बजे', add_member: 'mother', whatsapp: true }, stage: 'follow-up' },
    },
    fate: 'normal',
    ending: { reason: 'caller_hung_up', outcome: 'callback' },
    playMs: 8200,
  },
  {
    name: 'es',
    language: 'es-MX',
    provider: 'twilio',
    direction: 'inbound',
    from: '+525512345678',
    to: '+528001234567',
    script: `
assistant: Gracias por llamar a Fibra Directa. Soy Lucía, ¿en qué le puedo ayu—
caller: ¡Llevo tres días sin internet! Ya es la cuarta vez que llamo.
assistant: Lamento mucho la situación. Para ubicar su servicio necesito el número de contr—
caller: Se lo di ayer a su compañero, y anteayer a otro.
assistant: Tiene razón, aquí lo veo con su teléfono: señora Jiménez, colonia Roma Norte. ¿Es correcto?
caller: Sí, soy yo. ¿Y bien?
assistant: Veo que el módem no responde desde el lunes a las 14:32. Primero vamos a reini—
caller: No, no, no. Ya lo reinicié mil veces. Las luces están en rojo.
assistant: Entendido, no lo repetimos. La luz roja indica un corte en la fibra, así que debe ir un técnico.
caller: ¿Cuándo? Porque mañana trabajo desde ca—
assistant: Hoy mismo, entre las 16 y las 18 horas. ¿Habrá alguien en su domicilio?
caller: Sí, aquí voy a estar. ¿Y los días que no tuve servicio?
assistant: Se le descuentan tres días de la factura: son $61.50. Le llega un SMS con el folio.
caller: Bueno… gracias. Ojalá ahora sí.`,
    notes: {
      7: { data: { luz_modem: 'roja', reinicio: true }, stage: 'diagnóstico' },
      12: { data: { folio: 'RN-77120', descuento_mxn: 61.5 }, stage: 'visita programada' },
    },
    fate: 'normal',
    ending: { reason: 'completed', outcome: 'visit_booked' },
    playMs: 8000,
  },
  {
    name: 'ar',
    language: 'ar-AE',
    provider: 'plivo',
    direction: 'inbound',
    from: '+971501234567',
    to: '+97142345678',
    script: `
agent: أهلاً وسهلاً بكم في عيادة النور، معكم سارة. كيف أستطيع مساعدتكم؟
customer: مرحباً، أريد حجز موعد مع طبيب الأسنان لابني.
agent: بكل سرور. كم عمر ابنكم، وهل زار العيادة من قبل؟
customer: عمره سبع سنوات، وهذه أول زيارة. عنده ألم منذ يومين.
agent: سلامته. يوجد موعد غداً الساعة 4:30 مع الدكتور خالد. هل يناسبكم؟
customer: هل يوجد شيء أبكر؟ عندنا مدرسة في العصر.
agent: نعم، الساعة 11:15 صباحاً. ما رقم بطاقة التأمين من فضلكم؟
customer: الرقم ٧٨٤-١٩٨٧-٥٥٢١، من شركة Daman.
agent: شكراً. تم الحجز باسم يوسف، غداً الساعة 11:15.
customer: بارك الله فيكم، مع السلامة.`,
    notes: { 8: { data: { patient: 'يوسف', age: 7, insurer: 'Daman' }, stage: 'booked' } },
    fate: 'normal',
    ending: { reason: 'completed', outcome: 'booked' },
    playMs: 7400,
  },
  {
    name: 'ja',
    language: 'ja-JP',
    provider: 'twilio',
    direction: 'inbound',
    from: '+819012345678',
    to: '+81312345678',
    script: `
bot: お電話ありがとうございます。みどり運輸、自動受付です。ご用件をお話しください。
customer: すみません、今日届く予定の荷物を明日に変えたいんですが。
bot: かしこまりました。お問い合わせ番号の十二桁をお願いいたします。
customer: えっと、4082の、7719の、0035です。
bot: 4082-7719-0035ですね。東京都世田谷区の髙橋様でお間違いないでしょうか。
customer: はい、そうです。
bot: 明日の時間帯は、午前中、十四時から十六時、十九時から二十一時がございます。
customer: じゃあ、十九時からでお願いします。あと、宅配ボックスでも大丈夫ですか？
bot: 冷蔵のお荷物ですので、恐れ入りますが、直接のお渡しとなります。
customer: あ、そうですか。わかりました。
bot: 明日の十九時から二十一時に承りました。ほかにご用件はございますか。
customer: 大丈夫です。ありがとうございました。`,
    notes: { 7: { data: { 時間帯: '19-21', 冷蔵: true }, stage: '変更', objections: ['宅配ボックス不可'] } },
    fate: 'normal',
    ending: { reason: 'completed', outcome: 'rescheduled' },
    playMs: 7800,
  },
  {
    name: 'de',
    language: 'de-DE',
    provider: 'sipgate',
    direction: 'inbound',
    from: 'sip:mueller@example.de',
    to: '+493012345678',
    script: `
bot: Grüß Gott, hier ist der Störungsdienst der Wärmeprofis. Was können wir für Sie tun?
human: Müller, Größenstraße 12. Unsere Wärmepumpe läuft nicht mehr, und es sind draußen -7 °C! 🥶
bot: Oje, das ist unangenehm. Was zeigt das Display an?
human: Moment, ich muss in den Keller … da steht „E-17 – Durchfluss zu niedrig“.
system: 🔊 Hintergrundgeräusche
bot: Danke. Schauen Sie bitte auf das Manometer: Steht der Zeiger im grünen Bereich?
human: Äh, nein. Er steht ganz unten, ungefähr bei 0,4 bar.
bot: Dann fehlt Wasser. Öffnen Sie bitte langsam den Füllhahn, bis 1,8 bar erreicht sind.
human: Es zischt … 1,2 … 1,5 … jetzt 1,8! 💪
bot: Perfekt. Jetzt drücken Sie drei Sekunden lang auf „Zurücksetzen“.
human: Sie springt an! 🎉 Ich höre sie brummen.
bot: Sehr schön! Sollte der Druck bis übermorgen wieder fallen, kommt ein Monteur vorbei.
human: Vielen Dank, Sie haben unser Wochenende gerettet. 👩‍🔧❤️
bot: Gern geschehen. Tschüss und schöne Grüße!`,
    notes: { 6: { data: { fehler: 'E-17', druck_bar: 0.4 }, stage: 'Diagnose' }, 10: { data: { druck_bar: 1.8 } } },
    fate: 'drops',
    ending: { reason: 'completed', outcome: 'resolved' },
    playMs: 8400,
  },
  {
    name: 'long',
    language: 'en-IN',
    provider: 'exotel',
    direction: 'inbound',
    from: '+912066001234',
    to: '+918046009876',
    script: stocktaking(),
    notes: { 299: { data: { items: STOCKTAKING_ITEMS }, stage: 'done' } },
    fate: 'normal',
    ending: { reason: 'completed', outcome: 'list_complete' },
    playMs: 4000,
  },
]
